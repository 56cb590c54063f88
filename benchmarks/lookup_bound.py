"""What a sum of local evidence can reach: ``python -m benchmarks.lookup_bound``.

Three figures, all on noiseless symbolic scenes of the lookup data set; the docstring of
``make_lookup`` states them. A scene is a color for each of the five shapes shown and a cue among
those colors. The ceiling is printed first, with the receptive fields that it holds for; the fits
take minutes.

The ceiling, proven: no argmax_s [a_s(cue) + D_s(scene without cue)] is right more often. Fix five
shapes, five colors and the slots, which leaves 120 ways to color the shapes. For a coloring p
let C be the set of cues that are answered correctly. For k cues and k shapes, at most one matching
of the two is answered correctly for all k cues: suppose p and q both were. Summing a_p(c)(c) +
D_p(c) >= a_q(c)(c) + D_q(c) over the k cues c, where the D cancel, and the same with p and q
exchanged, shows that all of these are ties, and a tie is always broken the same way. A matching of
k extends to (5 - k)! colorings, hence the sum over colorings of binomial(|C|, k) is at most
binomial(5, k)^2 (5 - k)!. The ceiling is the largest mean of |C| / 5 under these constraints.

That a network is of this form needs windows of its receptive field that never hold both a pixel of
the cue and a pixel of a shape. Where they do not, the ceiling is the same for every
``data.distance``, since shapes and slots are fixed above.

What is reached with D: a_s(c) = s c, with colors and shapes numbered. D can make any set of cues
right whose shapes increase with their colors, so that |C| is the length of the longest increasing
subsequence. Here D sees all the shapes at once, which takes windows that do.

What is reached when every shape contributes on its own: argmax_s [a_s(cue) + sum_i d_s(shape_i,
color_i)]. All a and d are fitted by gradient descent from several random starts and the best is
scored on all 1,881,600 scenes. That is the best found, not a limit.
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from itertools import combinations, permutations, product
from math import comb, factorial

import torch
from torch import Tensor
from torch.nn import functional as F

from data.lookup import COLORS, CUE_SIZE, SHAPES, SHAPES_SHOWN, geometry

DISTANCES_PRINTED = (None, *range(4, 25, 4))
RESTARTS = 12
STEPS = 6000
SCENES_PER_STEP = 1024


def ceiling() -> Fraction:
    """The proven ceiling, as a fraction of the scenes."""
    shown, colorings = SHAPES_SHOWN, factorial(SHAPES_SHOWN)
    limits = {k: comb(shown, k) ** 2 * factorial(shown - k) for k in (3, 4, 5)}
    best = 0
    for five, four, three in product(*(range(min(limits[k], colorings) + 1) for k in (5, 4, 3))):
        # Two correct cues for every other coloring is generous, and therefore still a ceiling.
        counts = {5: five, 4: four, 3: three, 2: colorings - five - four - three}
        if counts[2] >= 0 and all(
            sum(n * comb(right, k) for right, n in counts.items()) <= limit
            for k, limit in limits.items()
        ):
            best = max(best, sum(n * right for right, n in counts.items()))
    return Fraction(best, shown * colorings)


def smallest_window(distance: int | None) -> int:
    """Side in pixels of the smallest square window that holds a pixel of the cue and of a shape.

    The ceiling holds up to a receptive field of one less. ``distance`` as for ``make_lookup``.
    """
    slots, cue_corners = geometry(distance)
    cue = [(r + i, c + j) for r, c in cue_corners for i in range(CUE_SIZE) for j in range(CUE_SIZE)]
    set_in_any = {
        (i, j)
        for pattern in SHAPES.values()
        for i, row in enumerate(pattern)
        for j, pixel in enumerate(row)
        if pixel == "#"
    }
    shapes = [(r + i, c + j) for r, c in slots for i, j in set_in_any]
    return 1 + min(max(abs(r - i), abs(c - j)) for r, c in cue for i, j in shapes)


def joint_reached() -> Fraction:
    """What a_s(c) = s c with the best D reaches, exactly."""
    orders = list(permutations(range(SHAPES_SHOWN)))
    return Fraction(sum(map(_longest_increasing, orders)), SHAPES_SHOWN * len(orders))


def _longest_increasing(order: tuple[int, ...]) -> int:
    tails: list[int] = []
    for value in order:
        index = bisect_left(tails, value)
        tails[index : index + 1] = [value]
    return len(tails)


def arrangements() -> tuple[Tensor, Tensor]:
    """Every choice of shapes with every coloring: shapes and colors, both (376320, 5)."""
    shapes = torch.tensor(list(combinations(range(len(SHAPES)), SHAPES_SHOWN)))
    colors = torch.tensor(list(permutations(range(len(COLORS)), SHAPES_SHOWN)))
    return shapes.repeat_interleave(len(colors), 0), colors.repeat(len(shapes), 1)


def additive_accuracy(cue: Tensor, shown: Tensor, shapes: Tensor, colors: Tensor) -> float:
    """Fraction of correct answers over the five cues of M scenes ``shapes``, ``colors`` (M, 5).

    ``cue`` (8 colors, 8 classes) is a, ``shown`` (8 shapes, 8 colors, 8 classes) is d.
    """
    scores = shown[shapes, colors].sum(1)
    right = sum(
        ((scores + cue[colors[:, i]]).argmax(1) == shapes[:, i]).sum().item()
        for i in range(SHAPES_SHOWN)
    )
    return right / (SHAPES_SHOWN * len(shapes))


def fit_additive(
    seed: int, shapes: Tensor, colors: Tensor, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """``cue`` and ``shown`` of ``additive_accuracy``, fitted to random scenes from a random start.

    In the first quarter of the steps the loss changes from cross-entropy to the expected error:
    cross-entropy spends parameters on scenes that are lost anyway, and the expected error alone
    makes no progress from a random start.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = len(SHAPES)
    cue = torch.randn(len(COLORS), classes, generator=generator).mul_(0.5).requires_grad_()
    shown = torch.randn(classes * len(COLORS), classes, generator=generator)
    shown = shown.mul_(0.5).requires_grad_()
    optimizer = torch.optim.Adam([cue, shown])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    for step in range(steps):
        scene = torch.randint(len(shapes), (SCENES_PER_STEP,), generator=generator)
        pairs = shapes[scene] * len(COLORS) + colors[scene]
        # embedding instead of indexing, whose gradient is an order of magnitude slower.
        scores = F.embedding(pairs, shown).sum(1)[:, None] + F.embedding(colors[scene], cue)
        right = scores.log_softmax(2).gather(2, shapes[scene][:, :, None])
        sharp = min(1.0, 4 * step / steps)
        loss = -((1 - sharp) * right + sharp * classes * right.exp()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return cue.detach(), shown.detach().view(classes, len(COLORS), classes)


def main() -> None:
    print(f"proven for any a and D: at most {100 * float(ceiling()):.1f} %")
    for distance in DISTANCES_PRINTED:
        task = f"data.distance={'null' if distance is None else distance}"
        print(f"  {task}: for receptive fields of up to {smallest_window(distance) - 1} pixels")
    print(
        f"reached with a D that sees all the shapes at once: {100 * float(joint_reached()):.1f} %"
    )
    shapes, colors = arrangements()
    best = 0.0
    for seed in range(RESTARTS):
        found = additive_accuracy(*fit_additive(seed, shapes, colors), shapes, colors)
        best = max(best, found)
        print(f"start {seed}: {100 * found:.2f} %", flush=True)
    print(f"best found where every shape contributes on its own: {100 * best:.0f} %")


if __name__ == "__main__":
    main()
