"""TrivialAugment, RandAugment and AutoAugment against torchvision's transforms on PIL images."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data.vision  # noqa: F401 (torchvision can then be imported)
from data import policies
from data.policies import OPERATIONS

transforms = pytest.importorskip("torchvision.transforms")
NAMES = list(OPERATIONS)
SIZES = [(11, 7), (8, 8), (9, 32)]
# Magnitudes for each operation: weak and strong, of both signs, spread over the real ranges.
SPREAD = torch.linspace(-0.99, 0.99, 12, dtype=torch.float64)
MAGNITUDES = {
    **dict.fromkeys(("ShearX", "ShearY", "Brightness", "Color", "Contrast", "Sharpness"), SPREAD),
    "TranslateX": torch.tensor([-32, -5.7, -1, -0.3, 0, 0.9, 1.07, 3.2, 6.9, 32]).double(),
    "TranslateY": torch.tensor([-32, -5.7, -1, -0.3, 0, 0.9, 1.07, 3.2, 6.9, 32]).double(),
    "Rotate": torch.tensor([-135, -94.5, -90, -30, -4.5, 0, 3.3, 40.5, 90, 135]).double(),
    "Posterize": torch.arange(2, 9).double(),
    "Solarize": torch.tensor([255, 254.5, 246.5, 128, 127.5, 8.5, 1, 0]).double(),
}
NONE = torch.zeros(6, dtype=torch.float64)


def pictures(number: int, height: int, width: int) -> torch.Tensor:
    """Return images: smooth and noisy, with a narrow range of values, and of one color."""
    generator = torch.Generator().manual_seed(height * width)
    pixels = torch.randint(256, (number, height, width, 3), generator=generator)
    pixels[1::3] = 90 + pixels[1::3] // 5
    pixels[2::3, :, :, 0] = torch.arange(width) * 5
    pixels[-1] = torch.tensor([17, 200, 90])
    return pixels.byte()


def by_pillow(pixels: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    """Apply torchvision's operation on a PIL image to one image (H, W, 3)."""
    nearest = transforms.InterpolationMode.NEAREST
    image = Image.fromarray(pixels.numpy())
    apply_op = transforms.autoaugment._apply_op
    return torch.from_numpy(np.array(apply_op(image, name, magnitude, nearest, fill=None)))


@pytest.mark.parametrize("height,width", SIZES)  # noqa: PT006
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_that_of_torchvision_on_pil_images(name, height, width):
    magnitudes = MAGNITUDES.get(name, NONE)
    pixels = pictures(len(magnitudes), height, width)
    before = pixels.clone()
    changed = OPERATIONS[name](pixels, magnitudes)
    assert torch.equal(pixels, before)
    assert changed.dtype == torch.uint8
    for image, magnitude, found in zip(pixels, magnitudes.tolist(), changed, strict=True):
        expected = by_pillow(image, name, magnitude)
        if name == "AutoContrast":  # Pillow's quotient may be just below an integer
            difference = found.int() - expected.int()
            assert set(difference.flatten().tolist()) <= {0, 1}
        else:
            assert torch.equal(found, expected), magnitude


def test_autocontrast_is_the_exact_quotient_rounded_down():
    values = [(low, high, v) for low in range(0, 256, 5) for high in range(low + 1, 256, 7)
              for v in range(low, high + 1, 3)]  # fmt: skip
    pixels = torch.tensor(values, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, -1, 3)
    found = policies._autocontrast(pixels, torch.zeros(len(values)))[:, 2, 0]
    expected = [(v - low) * 255 // (high - low) for low, high, v in values]
    assert found.T.tolist() == [expected] * 3


@pytest.mark.parametrize("side", [1, 2])
def test_an_image_too_small_to_be_smoothed_keeps_its_sharpness(side):
    pixels = pictures(4, side, 5)
    assert torch.equal(OPERATIONS["Sharpness"](pixels, torch.full((4,), 0.9).double()), pixels)


def test_each_sample_gets_its_own_operations_one_after_the_other():
    operations = torch.tensor([[5, 13], [0, 0], [13, 5], [5, 0], [0, 11], [10, 5], [5, 5]])
    magnitudes = torch.tensor([[30, 0], [0, 0], [0, 30], [-9, 0], [0, 99.5], [3, -60], [45, 45]])
    pixels = pictures(7, 11, 7)
    before = pixels.clone()
    found = policies.apply(pixels, operations, magnitudes.double())
    assert torch.equal(pixels, before)
    for k in range(7):
        image = pixels[k]
        for operation, magnitude in zip(
            operations[k].tolist(), magnitudes[k].tolist(), strict=True
        ):
            image = by_pillow(image, NAMES[operation], magnitude)
        assert torch.equal(found[k], image), k


def test_an_operation_is_called_once_a_step_on_all_its_samples(monkeypatch):
    calls = []
    for name, function in OPERATIONS.items():

        def counted(pixels, magnitudes, name=name, function=function):
            calls.append((name, len(pixels)))
            return function(pixels, magnitudes)

        monkeypatch.setitem(OPERATIONS, name, counted)  # fmt: skip
    drawn = draw("rand", 200)
    policies.apply(pictures(200, 8, 8), **drawn)
    assert len(calls) <= 2 * 13
    expected = Counter(NAMES[operation] for operation in drawn["operations"].flatten().tolist())
    del expected["Identity"]
    assert sum((Counter({name: number}) for name, number in calls), Counter()) == expected


def draw(policy, number, size=(11, 7), ops=2, magnitude=9):
    generator = torch.Generator().manual_seed(4)
    return policies.draw(policy, number, size, generator, ops, magnitude)


def possible(space: dict, at: int | None = None) -> set[tuple[str, float]]:
    """Return all (operation, magnitude) pairs that torchvision's transform may choose."""
    found = set()
    for name, (magnitudes, signed) in space.items():
        values = magnitudes.double().view(-1).tolist()
        if at is not None and len(values) > 1:
            values = [values[at]]
        found |= {
            (name, sign * value) for value in values for sign in ((1, -1) if signed else (1,))
        }
    return found


def drawn_pairs(drawn) -> list[tuple[str, float]]:
    return [
        (NAMES[operation], magnitude)
        for operation, magnitude in zip(
            drawn["operations"].flatten().tolist(), drawn["magnitudes"].flatten().tolist(),
            strict=True,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_operations_and_magnitudes_are_torchvisions_evenly(policy):
    number, size = 60_000, (11, 7)
    drawn = draw(policy, number, size, ops=2, magnitude=13)
    if policy == "trivial":
        expected = possible(transforms.TrivialAugmentWide()._augmentation_space(31))
    else:
        expected = possible(transforms.RandAugment()._augmentation_space(31, size), at=13)
    counts = Counter(drawn_pairs(drawn))
    assert set(counts) == expected
    for step in drawn["operations"].T:
        share = torch.bincount(step, minlength=14) / number
        # Five standard deviations of a binomial share.
        assert (share - 1 / 14).abs().max() < 5 * (1 / 14 * 13 / 14 / number) ** 0.5
    signs = [m > 0 for name, m in drawn_pairs(drawn) if name == "Rotate" and m]
    assert abs(sum(signs) / len(signs) - 0.5) < 5 * 0.5 / len(signs) ** 0.5
    if policy == "rand":
        assert not torch.equal(*drawn["operations"].T)
        again = draw(policy, number, size, ops=3, magnitude=13)
        assert torch.equal(again["operations"][:, :2], drawn["operations"])


def test_autoaugment_has_torchvisions_pairs_with_their_probabilities():
    number, size = 100_000, (11, 7)
    reference = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    space = reference._augmentation_space(10, size)
    expected: Counter = Counter()
    for pair in reference.policies:
        options = []
        for name, probability, level in pair:
            magnitudes, signed = space[name]
            value = float(magnitudes[level]) if level is not None else 0.0
            signs = (1, -1) if signed else (1,)
            options.append(
                [(("Identity", 0.0), 1 - probability)]
                + [((name, s * value), probability / len(signs)) for s in signs]
            )
        for first, p in options[0]:
            for second, q in options[1]:
                expected[first, second] += p * q / 25  # fmt: skip
    drawn = draw("auto", number, size)
    pairs = drawn_pairs(drawn)
    counts = Counter(zip(pairs[::2], pairs[1::2], strict=True))
    assert set(counts) <= {pair for pair, p in expected.items() if p > 1e-9}
    for pair, p in expected.items():
        assert abs(counts[pair] / number - p) < 5 * (p * (1 - p) / number) ** 0.5 + 1e-9, pair
