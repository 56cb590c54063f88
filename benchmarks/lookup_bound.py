"""The accuracy that a sum of local evidence can reach: ``python -m benchmarks.lookup_bound``.

The ceiling, stated in the docstring of ``make_lookup``, is for noiseless symbolic scenes of the
lookup data set. A scene is a color for each of the five shapes shown and a cue among those colors.
The ceiling is printed with the receptive fields that it holds for.

Proof that no argmax_s [a_s(cue) + D_s(scene without cue)] is right more often than that: fix five
shapes, five colors and the slots, which leaves 120 ways to color the shapes. For a coloring p
let C be the set of cues that are answered correctly. For k cues and k shapes, at most one matching
of the two is answered correctly for all k cues: suppose p and q both were. Summing a_p(c)(c) +
D_p(c) >= a_q(c)(c) + D_q(c) over the k cues c, where the D cancel, and the same with p and q
exchanged, shows that all of these are ties, and a tie is always broken the same way. A matching of
k extends to (5 - k)! colorings, hence the sum over colorings of binomial(|C|, k) is at most
binomial(5, k)^2 (5 - k)!. The ceiling is the largest mean of |C| / 5 under these constraints.

A network has this form if no window of its receptive field holds both a pixel of the cue and a
pixel of a shape. If so, the ceiling is the same for every ``data.distance``, since shapes and slots
are fixed above.
"""

from fractions import Fraction
from itertools import product
from math import comb, factorial

from data.lookup import CUE_SIZE, SHAPES, SHAPES_SHOWN, geometry

DISTANCES_PRINTED = (None, *range(4, 25, 4))


def ceiling() -> Fraction:
    """Return the proven ceiling, as a fraction of the scenes."""
    shown, colorings = SHAPES_SHOWN, factorial(SHAPES_SHOWN)
    limits = {k: comb(shown, k) ** 2 * factorial(shown - k) for k in (3, 4, 5)}
    best = 0
    for five, four, three in product(*(range(min(limits[k], colorings) + 1) for k in (5, 4, 3))):
        # Two correct cues for every other coloring is generous, so the result is still a ceiling.
        counts = {5: five, 4: four, 3: three, 2: colorings - five - four - three}
        if counts[2] >= 0 and all(
            sum(n * comb(right, k) for right, n in counts.items()) <= limit
            for k, limit in limits.items()
        ):
            best = max(best, sum(n * right for right, n in counts.items()))
    return Fraction(best, shown * colorings)


def smallest_window(distance: int | None) -> int:
    """Side in pixels of the smallest square window with a pixel of the cue and one of a shape.

    The ceiling holds for receptive fields below this. ``distance`` is as for ``make_lookup``.
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


def main() -> None:
    print(f"proven for any a and D: at most {100 * float(ceiling()):.1f} %")
    for distance in DISTANCES_PRINTED:
        task = f"data.distance={'null' if distance is None else distance}"
        print(f"  {task}: for receptive fields of up to {smallest_window(distance) - 1} pixels")


if __name__ == "__main__":
    main()
