import hashlib
import itertools
import random
import re
from fractions import Fraction

import pytest
import torch
from hydra.utils import instantiate

from benchmarks import lookup_bound
from benchmarks.lookup_bound import ceiling, smallest_window
from data import make_lookup
from data.lookup import BACKGROUND, COLORS, SHAPES, SLOTS
from training.variants import variant_settings

COLOR_OF = {value: name for name, value in COLORS.items()}
CLASSES = list(SHAPES)
# Positions of the shapes if there is a distance: five in a column along the right side.
COLUMN = [(0, 26), (6, 26), (13, 26), (20, 26), (26, 26)]


def colored(image: torch.Tensor) -> dict[tuple[int, int], str]:
    """Return the pixels that are not background, with the names of their colors."""
    found = {}
    for row, line in enumerate(image.tolist()):
        for column, value in enumerate(line):
            if tuple(value) != BACKGROUND:
                found[row, column] = COLOR_OF[tuple(value)]
    return found


def read_shapes(pixels: dict[tuple[int, int], str], slots=SLOTS) -> dict[str, str]:
    """Return the color of each shape in the slots, found by comparing all patterns."""
    found = {}
    for row, column in slots:
        here = {
            (i, j): pixels[row + i, column + j]
            for i, j in itertools.product(range(6), repeat=2)
            if (row + i, column + j) in pixels
        }
        for name, lines in SHAPES.items():
            pattern = {
                (i, j) for i, j in itertools.product(range(6), repeat=2) if lines[i][j] == "#"
            }
            if here.keys() == pattern:
                (found[name],) = set(here.values())
    return found


@pytest.mark.parametrize("distance", [None, 1, 4, 13, 24])
def test_the_class_is_the_shape_in_the_color_of_the_cue(distance):
    images = make_lookup(100, 1, noise=0.0, distance=distance).train
    slots, cue_pixels = SLOTS, list(itertools.product(range(2), repeat=2))
    if distance is not None:
        slots, columns = COLUMN, (24 - distance, 25 - distance)
        cue_pixels = list(itertools.product(range(32), columns))
    for image, label in zip(images.pixels, images.labels.tolist(), strict=True):
        pixels = colored(image)
        cue = {pixels.pop(position) for position in cue_pixels}
        shown = read_shapes(pixels, slots)
        assert len(pixels) == 20 * 5
        assert len(shown) == len(set(shown.values())) == 5
        assert cue == {shown[CLASSES[label]]}


def test_every_shape_begins_where_its_distance_from_the_stripe_ends():
    for lines in SHAPES.values():
        assert any(line[0] == "#" for line in lines)
    for distance in (3, 17):
        for image in make_lookup(40, 1, noise=0.0, distance=distance).train.pixels:
            columns = sorted({column for _, column in colored(image)})
            assert columns == [24 - distance, 25 - distance, *range(26, 32)]


def test_nothing_but_the_stripe_changes_with_the_distance():
    near, far = (make_lookup(50, 20, distance=distance) for distance in (2, 23))
    for part in ("train", "evaluation"):
        one, other = getattr(near, part), getattr(far, part)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.pixels[:, :, 26:], other.pixels[:, :, 26:])
        assert not torch.equal(one.pixels, other.pixels)


def test_with_a_distance_the_answer_is_in_every_slot_equally_often():
    images = make_lookup(800, 1, noise=0.0, distance=6).train
    slots = []
    for image, label in zip(images.pixels, images.labels.tolist(), strict=True):
        pixels = colored(image)
        slots += [s for s in COLUMN if CLASSES[label] in read_shapes(pixels, [s])]
    assert len(slots) == 800
    # Five standard deviations of a binomial count.
    for slot in COLUMN:
        assert abs(slots.count(slot) - 160) < 5 * (800 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("distance", [None, 1, 8, 24])
def test_the_smallest_window_is_the_first_that_holds_cue_and_shape_in_an_image(distance):
    images = make_lookup(30, 1, noise=0.0, distance=distance).train.pixels
    inked = (images != torch.tensor(BACKGROUND)).any(-1)
    cue = torch.zeros(32, 32, dtype=torch.bool)
    if distance is None:
        cue[:2, :2] = True
    else:
        cue[:, 24 - distance : 26 - distance] = True
    found = None
    for side in range(1, 33):
        for top, left in itertools.product(range(33 - side), repeat=2):
            here = inked[:, top : top + side, left : left + side]
            of_cue = cue[top : top + side, left : left + side]
            if ((here & of_cue).any((1, 2)) & (here & ~of_cue).any((1, 2))).any():
                found = found or side
        if found:
            break
    assert smallest_window(distance) == found == (26 if distance is None else distance + 2)


def test_the_module_prints_how_far_the_ceiling_holds(capsys):
    lookup_bound.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("at most 64.2 %")
    assert [re.findall(r"null|\d+", line) for line in lines[1:8]] == [
        ["null", "25"], ["4", "5"], ["8", "9"], ["12", "13"], ["16", "17"], ["20", "21"],
        ["24", "25"],
    ]  # fmt: skip


def test_the_distance_is_a_setting_that_changes_the_images_and_names_a_variant(settings):
    corner, stripe = settings(), settings("data.distance=7")
    images = [instantiate(cfg.data, _convert_="all").train.pixels for cfg in (corner, stripe)]
    assert torch.equal(images[0], make_lookup(96, 40).train.pixels)
    assert torch.equal(images[1], make_lookup(96, 40, distance=7).train.pixels)
    assert not torch.equal(*images)
    null, seven = (
        variant_settings({"data": {"_target_": "data.make_lookup", "distance": distance}})
        for distance in (None, 7)
    )
    assert null != seven


def test_every_shape_color_slot_and_class_is_equally_likely():
    images = make_lookup(train_size=2000, test_size=1, noise=0.0).train
    drawn = [
        (c, read_shapes(colored(x)))
        for c, x in zip(images.labels[:300], images.pixels, strict=False)
    ]
    for counts, share in (
        (torch.bincount(images.labels, minlength=8), 1 / 8),
        (count(shape for _, shown in drawn for shape in shown), 1 / 8),
        (count(color for _, shown in drawn for color in shown.values()), 1 / 8),
        (slot_counts(images.pixels), 1 / 7),
    ):
        expected = counts.sum() * share
        assert len(counts) == round(1 / share)
        # Five standard deviations of a binomial count.
        assert (counts - expected).abs().max() < 5 * (expected * (1 - share)) ** 0.5


def count(names) -> torch.Tensor:
    names = list(names)
    return torch.tensor([names.count(name) for name in sorted(set(names))])


def slot_counts(pixels: torch.Tensor) -> torch.Tensor:
    inked = (pixels != torch.tensor(BACKGROUND)).any(-1)
    return torch.stack([inked[:, i : i + 6, j : j + 6].flatten(1).any(1).sum() for i, j in SLOTS])


def test_patterns_are_alike_in_size_and_unlike_in_form():
    for lines in SHAPES.values():
        assert sum(line.count("#") for line in lines) == 20
        assert all(len(line) == 6 and line == line[::-1] for line in lines)
    for first, second in itertools.combinations(SHAPES.values(), 2):
        assert sum(a != b for a, b in zip("".join(first), "".join(second), strict=True)) >= 12


def test_noise_is_as_strong_as_it_says_and_changes_nothing_else():
    clean, noisy = (make_lookup(50, 1, noise=noise).train for noise in (0.0, 0.1))
    assert clean.labels.tolist() == noisy.labels.tolist()
    background = (clean.pixels == torch.tensor(BACKGROUND)).all(-1)
    error = noisy.pixels[background].double() - 128
    assert error.std().item() == pytest.approx(25.5, rel=0.01)
    assert error.mean().item() == pytest.approx(0, abs=0.3)
    weak = make_lookup(50, 1, noise=0.01).train.pixels[background].double() - 128
    assert weak.std().item() == pytest.approx(2.55, rel=0.03)


def test_strong_noise_stays_within_a_byte_without_wrapping():
    clean, noisy = (make_lookup(50, 1, noise=noise).train.pixels for noise in (0.0, 0.3))
    white, black = noisy[clean == 216].float().mean(), noisy[clean == 40].float().mean()
    assert white > 170
    assert black < 85


def test_seeds_and_splits_draw_differently():
    base = make_lookup(40, 40)
    assert torch.equal(base.train.pixels, make_lookup(40, 40).train.pixels)
    for other in (make_lookup(40, 40, data_seed=1).train, base.evaluation):
        assert not torch.equal(base.train.labels, other.labels)
    assert not torch.equal(
        base.evaluation.labels, make_lookup(40, 40, data_seed=1).evaluation.labels
    )
    torch.manual_seed(77)
    assert torch.equal(base.train.pixels, make_lookup(40, 40).train.pixels)


def test_sizes_names_and_held_out_images():
    dataset = make_lookup(50, 20)
    assert (len(dataset.train), len(dataset.evaluation)) == (50, 20)
    assert (dataset.name, dataset.evaluated_on) == ("lookup", "test")
    assert (dataset.num_classes, dataset.class_names) == (8, tuple(SHAPES))

    held = make_lookup(50, 20, val_size=7)
    assert (len(held.train), len(held.evaluation), held.evaluated_on) == (43, 7, "val")
    assert sorted(torch.cat([held.train.labels, held.evaluation.labels]).tolist()) == sorted(
        dataset.train.labels.tolist()
    )


def test_the_images_stay_the_same_from_version_to_version():
    dataset = make_lookup(8, 8, noise=0.0)
    assert dataset.train.labels.tolist() == [3, 7, 0, 7, 2, 1, 1, 7]
    assert dataset.evaluation.labels.tolist() == [3, 4, 6, 1, 4, 2, 3, 3]
    digest = hashlib.sha256()
    for images in (dataset.train, dataset.evaluation):
        digest.update(images.pixels.numpy().tobytes())
    # The digest of the images before the setting data.distance existed.
    assert digest.hexdigest() == "0116d8c31944f679380988a299facba535c453053ec6076a3da5abb78ccb657f"


def test_mean_and_deviation_are_those_of_the_training_pixels_held_out_or_not():
    dataset, split = make_lookup(60, 1), make_lookup(60, 1, val_size=30)
    assert (split.mean, split.std) == (dataset.mean, dataset.std)
    for channel in range(3):
        values = [v / 255 for v in dataset.train.pixels[..., channel].flatten().tolist()]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        assert dataset.mean[channel] == pytest.approx(mean, rel=1e-6)
        assert dataset.std[channel] == pytest.approx(variance**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_size", 0),
        ("test_size", -1),
        ("noise", -0.1),
        ("noise", 1.1),
        ("noise", float("nan")),
        ("val_size", -1),
        ("val_size", 10_000),
        ("distance", 0),
        ("distance", 25),
        ("distance", -1),
        ("distance", 4.5),
    ],
)
def test_mistakes_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={re.escape(str(value))} "):
        make_lookup(**{name: value})


def test_the_docstring_states_the_ceiling():
    assert f"at most {100 * float(ceiling()):.1f} %, proven" in " ".join(
        make_lookup.__doc__.split()
    )


def test_ceiling_is_the_one_counted_by_hand():
    # 25 matchings of four give 25 colorings with four right; they use 100 of the 200 threes, and
    # the other 95 colorings use one each.
    assert ceiling() == Fraction(25 * 4 + 95 * 3, 600)


def test_only_one_coloring_of_three_shapes_can_be_answered_completely():
    # The key step in the proof of the ceiling, checked on a fine grid of all D.
    generator = random.Random(3)
    grid = [x / 4 for x in range(-16, 17)]
    for _ in range(5):
        a = [[generator.uniform(-1, 1) for _ in range(3)] for _ in range(3)]
        all_correct = set()
        for d in itertools.product([0.0], grid, grid):
            chosen = tuple(max(range(3), key=lambda s: a[c][s] + d[s]) for c in range(3))
            if len(set(chosen)) == 3:
                all_correct.add(chosen)
        assert len(all_correct) == 1


def test_the_digest_is_of_what_the_images_are_drawn_from():
    own = {"train_size": 6, "test_size": 3}
    digest = make_lookup(**own).digest
    assert make_lookup(**own).digest == digest
    changes = [{"train_size": 7}, {"test_size": 4}, {"noise": 0.1}, {"distance": 4}]
    changes += [{"data_seed": 1}, {"val_size": 2}, {"val_size": 3}]
    assert len({digest, *(make_lookup(**own | change).digest for change in changes)}) == 8
    held_out = {"train_size": 6, "val_size": 2}
    digests = {make_lookup(**held_out, test_size=size).digest for size in (3, 4)}
    assert len(digests) == 1  # with held-out images, no test images are drawn
