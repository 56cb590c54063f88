"""The random draws of mixup, CutMix and random erasing, against their definitions per sample."""

import math

import pytest
import torch
from scipy import stats

from data import erasing, mixing

SIZE = HEIGHT, WIDTH = 12, 7


def draw(mixup: float, cutmix: float, number: int = 3000):
    return mixing.draw(mixup, cutmix, number, SIZE, 3, 0)


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 0.5, 1.0, 4.0, 1e12])
def test_the_share_is_of_the_beta_distribution(alpha):
    samples = mixing._beta(alpha, 4000, torch.Generator().manual_seed(1))
    assert samples.isfinite().all()
    assert ((samples >= 0) & (samples <= 1)).all()
    assert abs(samples.mean() - 0.5) < 5 * 0.5 / 4000**0.5
    if 1e-3 < alpha < 1e12:
        assert stats.kstest(samples.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    else:  # all or nothing, or half each
        assert (samples - samples.round()).abs().median() < 1e-6 or alpha > 1
        assert (samples - 0.5).abs().max() < 1e-5 or alpha < 1


def test_everyone_is_a_partner_once_and_nobody_their_own():
    for number in (1, 2, 3, 50):
        partner = draw(1.0, 0.0, number)["partner"].tolist()
        assert sorted(partner) == list(range(number))
        assert number == 1 or all(p != k for k, p in enumerate(partner))


def test_mixup_alone_pastes_nothing():
    draws = draw(0.4, 0.0)
    assert not draws["box"].any()
    assert torch.equal(draws["outside"], draws["share"])
    assert stats.kstest(draws["share"].numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_cutmix_alone_pastes_a_box_of_the_size_that_the_share_says():
    draws = draw(0.0, 1.0)
    assert (draws["outside"] == 1).all()
    for (top, bottom, left, right), share in zip(
        draws["box"].tolist(), draws["share"].tolist(), strict=True
    ):
        assert 0 <= top <= bottom <= HEIGHT
        assert 0 <= left <= right <= WIDTH
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / (HEIGHT * WIDTH))
    # Draw boxes one by one.
    generator, boxes = torch.Generator().manual_seed(3), []
    for _ in range(3000):
        removed = math.sqrt(1 - torch.rand(1, generator=generator).item())
        box = []
        for side in SIZE:
            center = int(torch.randint(side, (1,), generator=generator))
            half = int(removed * side / 2)
            box += [max(center - half, 0), min(center + half, side)]
        boxes.append(box)
    for found, expected in zip(draws["box"].T, torch.tensor(boxes).T, strict=True):
        assert stats.ks_2samp(found.tolist(), expected.tolist()).pvalue > 1e-3


def test_with_both_each_sample_gets_one_of_the_two_as_it_would_get_it_alone():
    both, mixup, cutmix = draw(0.4, 1.0), draw(0.4, 0.0), draw(0.0, 1.0)
    assert torch.equal(both["partner"], mixup["partner"])
    is_mixup, is_cutmix = (
        torch.stack([(both[name] == one[name]).view(3000, -1).all(1) for name in both]).all(0)
        for one in (mixup, cutmix)
    )
    assert (is_mixup | is_cutmix).all()
    assert abs(is_mixup.float().mean() - 0.5) < 0.06
    assert abs(is_cutmix.float().mean() - 0.5) < 0.06


def test_rectangles_are_erased_as_torchvision_draws_them():
    number, probability = 4000, 0.3
    (boxes,) = erasing.draw(probability, number, SIZE, torch.Generator().manual_seed(2)).values()
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    erased = heights * widths > 0
    assert not boxes[~erased].any()
    assert (boxes >= 0).all()
    assert boxes[:, 1].max() == HEIGHT
    assert boxes[:, 3].max() == WIDTH
    # Draw rectangles one by one, with up to 10 attempts each.
    generator, expected = torch.Generator().manual_seed(3), []
    for _ in range(number):
        for _ in range(10):
            area, ratio = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            area = (0.02 + 0.31 * area) * HEIGHT * WIDTH
            ratio = math.exp(math.log(0.3) + ratio * math.log(3.3 / 0.3))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < HEIGHT and width < WIDTH:
                expected.append((height, width))
                break
    share = sum(h * w > 0 for h, w in expected) / number * probability
    assert abs(erased.float().mean() - share) < 5 * (share * (1 - share) / number) ** 0.5
    for found, side in ((heights, 0), (widths, 1)):
        theirs = [pair[side] for pair in expected if pair[0] * pair[1]]
        assert stats.ks_2samp(found[erased].tolist(), theirs).pvalue > 1e-3
    rows_free = (HEIGHT - heights[erased]).double()
    positions = (boxes[erased, 0] / rows_free).mean()
    assert abs(positions - 0.5) < 5 * 0.5 / erased.sum() ** 0.5


def test_a_higher_probability_erases_the_same_rectangles_and_more():
    few, many = (
        erasing.draw(p, 500, SIZE, torch.Generator().manual_seed(2))["erased"] for p in (0.2, 1.0)
    )
    erased = few.any(dim=1)
    assert 0 < erased.sum() < 200
    assert torch.equal(few[erased], many[erased])
    assert many.any(dim=1).sum() > 450
