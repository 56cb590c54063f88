import itertools
import subprocess
import sys

import pytest
import torch

from data import Augmentation, Dataset, Images
from data.dataset import hold_out, seeded_generator


def numbered_images(number: int) -> Images:
    """Images of 2x3 pixels that carry their own number in every pixel and in the label."""
    labels = torch.arange(number)
    return Images(labels.to(torch.uint8)[:, None, None, None].expand(-1, 2, 3, 3).clone(), labels)


def test_importing_data_leaves_torchvision_alone():
    script = "import data, sys; sys.exit(any(m.startswith('torchvision') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(2, 4, 5, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 5, 3, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 4, 5, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_images_of_a_wrong_kind_are_refused(pixels, labels):
    with pytest.raises(AssertionError):
        Images(pixels, labels)


def test_data_set_moves_whole_and_knows_its_size():
    images = numbered_images(5)
    dataset = Dataset(
        "x", images, images, "test", 1, ("a",), (0.5,) * 3, (0.2,) * 3, Augmentation()
    )
    assert dataset.image_size == (2, 3)
    moved = dataset.to("meta")
    assert {
        tensor.device.type
        for part in (moved.train, moved.evaluation)
        for tensor in (part.pixels, part.labels)
    } == {"meta"}
    assert len(moved.train) == 5
    assert moved.name == "x"


def test_hold_out_splits_without_loss_and_keeps_image_with_label():
    rest, held = hold_out(numbered_images(101), 23)
    assert (len(rest), len(held)) == (78, 23)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(101))
    for part in (rest, held):
        assert part.pixels[:, 1, 2, 0].tolist() == part.labels.tolist()
        assert part.labels.tolist() == sorted(part.labels.tolist())


def test_hold_out_is_random_but_always_the_same():
    torch.manual_seed(1)
    first = hold_out(numbered_images(101), 23)[1].labels.tolist()
    torch.manual_seed(2)
    assert hold_out(numbered_images(101), 23)[1].labels.tolist() == first
    assert first[-1] - first[0] > 50
    assert len({b - a for a, b in itertools.pairwise(first)}) > 3


@pytest.mark.parametrize("size", [-1, 101, 102])
def test_hold_out_refuses_a_size_that_does_not_fit(size):
    with pytest.raises(ValueError, match=f"val_size={size} "):
        hold_out(numbered_images(101), size)


@pytest.mark.parametrize("name", ["crop_pad", "cutout"])
def test_negative_augmentation_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=-1 "):
        Augmentation(**{name: -1})


@pytest.mark.parametrize(("name", "largest"), [("crop_pad", 6), ("cutout", 7)])
def test_augmentation_must_fit_the_shorter_side(name, largest):
    Augmentation(**{name: largest}).check_fits(11, 7)
    Augmentation(**{name: largest}).check_fits(7, 11)
    with pytest.raises(ValueError, match=f"{name}={largest + 1} .*11x7"):
        Augmentation(**{name: largest + 1}).check_fits(11, 7)


def test_every_part_of_a_seed_counts():
    seeds = {
        seeded_generator(*parts).initial_seed()
        for parts in [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0), ("a", 10), ("a", 1, 0, 0)]
    }
    assert len(seeds) == 6
    assert max(seeds) < 2**32
