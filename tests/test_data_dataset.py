import itertools
import re
import subprocess
import sys

import pytest
import torch

from data import Augmentation, Dataset, Images
from data.dataset import check_val_size, hold_out, seeded_generator


def numbered_images(number: int) -> Images:
    """Return 2x3 images that have their own index in every pixel and as their label."""
    labels = torch.arange(number)
    return Images(labels.to(torch.uint8)[:, None, None, None].expand(-1, 2, 3, 3).clone(), labels)


def test_importing_data_leaves_torchvision_alone():
    script = "import data, sys; sys.exit(any(m.startswith('torchvision') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def uint8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def int64(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("pixels", "labels", "line"),
    [
        (torch.zeros(2, 4, 5, 3), int64(2), "pixels has dtype torch.float32; expected torch.uint8"),
        (uint8(2, 4, 5, 3).numpy(), int64(2), "pixels is a ndarray; expected a tensor of"),
        (uint8(2, 4, 5, 3), torch.zeros(2), "labels has dtype torch.float32; expected torch.int64"),
        (uint8(2, 4, 5, 3), [0, 1], "labels is a list; expected a tensor of torch.int64"),
        (uint8(2, 4, 5, 3), int64(3), "labels has shape (3,); expected (2,), one label for each"),
        (uint8(2, 4, 5, 3), int64(2, 1), "labels has shape (2, 1); expected (2,)"),
        (
            uint8(2, 3, 4, 5),
            int64(2),
            "pixels has shape (2, 3, 4, 5); expected (N, H, W, 3), RGB with the channels last; "
            "use pixels.permute(0, 2, 3, 1)",
        ),
        (uint8(2, 4, 5), int64(2), "expected (N, H, W, 3), RGB with the channels last; for gray"),
        (uint8(2, 4, 5, 1), int64(2), "for gray images repeat the one channel three times"),
        (uint8(2, 4, 5, 4), int64(2), "pixels has shape (2, 4, 5, 4); expected (N, H, W, 3)"),
        (uint8(6), int64(6), "pixels has shape (6,); expected (N, H, W, 3)"),
    ],
)
def test_images_of_a_wrong_kind_are_refused(pixels, labels, line):
    with pytest.raises(ValueError, match=re.escape(line)) as refused:
        Images(pixels, labels)
    assert "\n" not in str(refused.value)


def own_dataset(**changes) -> Dataset:
    """Return five images of five classes as a user's data set, with ``changes`` to its fields."""
    images = numbered_images(5)
    fields = {
        "name": "own",
        "train": images,
        "evaluation": images,
        "evaluated_on": "test",
        "num_classes": 5,
        "class_names": tuple("abcde"),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    return Dataset(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"evaluated_on": "held-out"}, "evaluated_on='held-out' is unknown; give 'test' or 'val'"),
        ({"class_names": ("a", "b")}, "class_names has 2 names; expected num_classes=5 of them"),
        (
            {"num_classes": 4, "class_names": tuple("abcd")},
            "the labels of train go from 0 to 4; expected 0 to 3, since num_classes=4",
        ),
        (
            {"evaluation": Images(uint8(2, 2, 3, 3), torch.tensor([3, -1]))},
            "the labels of evaluation go from -1 to 3; expected 0 to 4",
        ),
        (
            {"evaluation": Images(uint8(2, 3, 2, 3), int64(2))},
            "the images of evaluation are 3x2; expected 2x3 as in train",
        ),
        ({"train": Images(uint8(0, 2, 3, 3), int64(0))}, "train has no images"),
        ({"evaluation": Images(uint8(0, 2, 3, 3), int64(0))}, "evaluation has no images"),
        ({"mean": (0.5,)}, "mean=(0.5,) and std=(0.2, 0.3, 0.4) must have three values"),
        ({"std": (0.2, 0.0, 0.4)}, "std=(0.2, 0.0, 0.4) must have three values each, those of std"),
    ],
)
def test_a_data_set_that_contradicts_itself_is_refused(changes, line):
    with pytest.raises(ValueError, match=re.escape(line)) as refused:
        own_dataset(**changes)
    assert "\n" not in str(refused.value)


def test_data_set_moves_whole_and_knows_its_size():
    dataset = own_dataset()
    assert dataset.image_size == (2, 3)
    moved = dataset.to("meta")
    assert {
        tensor.device.type
        for images in (moved.train, moved.evaluation)
        for tensor in (images.pixels, images.labels)
    } == {"meta"}
    assert len(moved.train) == 5
    assert moved.name == "own"


def test_hold_out_splits_without_loss_and_keeps_image_with_label():
    rest, held = hold_out(numbered_images(101), 23)
    assert (len(rest), len(held)) == (78, 23)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(101))
    for split in (rest, held):
        assert split.pixels[:, 1, 2, 0].tolist() == split.labels.tolist()
        assert split.labels.tolist() == sorted(split.labels.tolist())


def test_hold_out_is_random_but_always_the_same():
    torch.manual_seed(1)
    first = hold_out(numbered_images(101), 23)[1].labels.tolist()
    torch.manual_seed(2)
    assert hold_out(numbered_images(101), 23)[1].labels.tolist() == first
    assert first[-1] - first[0] > 50
    assert len({b - a for a, b in itertools.pairwise(first)}) > 3


def test_the_images_held_out_stay_the_same_from_version_to_version():
    # Scores on held-out images are only comparable if the images are the same.
    held_out = [4, 7, 8, 10, 12, 19]
    assert hold_out(numbered_images(20), 6)[1].labels.tolist() == held_out
    longer = hold_out(numbered_images(20), 9)[1].labels.tolist()
    assert set(held_out) < set(longer)


@pytest.mark.parametrize("size", [-1, 101, 102])
def test_a_size_that_cannot_be_held_out_is_refused(size):
    with pytest.raises(ValueError, match=f"val_size={size} "):
        check_val_size(size, 101)


@pytest.mark.parametrize(
    "name", ["crop_pad", "cutout", "mixup", "cutmix", "erasing", "rand_ops", "rand_magnitude"]
)
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


def test_a_data_set_without_a_digest_has_one_of_its_images():
    same, other = own_dataset(), own_dataset(name="other", mean=(0.1, 0.1, 0.1))
    assert same.digest == other.digest == own_dataset().to("cpu").digest
    assert re.fullmatch("[0-9a-f]{16}", same.digest)
    assert own_dataset(digest="abc").digest == "abc"
    train = same.train
    for changed in (
        Images(train.pixels ^ 1, train.labels),
        Images(train.pixels, train.labels.flip(0)),
        Images(train.pixels.flip(0), train.labels),
    ):
        assert len({same.digest, own_dataset(train=changed).digest}) == 2
        assert own_dataset(evaluation=changed).digest != same.digest
