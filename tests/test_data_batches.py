import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data import Augmentation, Batches, Images, evaluation_batches
from data.policies import OPERATIONS, POLICIES

NUMBER, HEIGHT, WIDTH = 29, 11, 7
MEAN, STD = (0.3, 0.5, 0.7), (0.2, 0.25, 0.4)


def random_images(number: int = NUMBER, height: int = HEIGHT, width: int = WIDTH) -> Images:
    generator = torch.Generator().manual_seed(5)
    # No zeros, so that a zero can only come from padding.
    pixels = torch.randint(1, 256, (number, height, width, 3), generator=generator)
    return Images(pixels.to(torch.uint8), torch.arange(number))


def batches(augmentation=None, batch_size=5, seed=3, images=None, **options) -> Batches:
    augmentation = augmentation or Augmentation()
    images = images or random_images()
    return Batches(images, batch_size, augmentation, MEAN, STD, seed, num_classes=NUMBER, **options)


def draws_of(source: Batches, epoch: int = 0) -> SimpleNamespace:
    number, height, width, _ = source.images.pixels.shape
    return SimpleNamespace(**source.augmentation.draw(number, (height, width), source.seed, epoch))


def whole_epoch(source: Batches, epoch: int = 0, start: int = 0):
    drawn = list(source.epoch(epoch, start))
    return torch.cat([x for x, _ in drawn]), torch.cat([y for _, y in drawn])


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalization; return (B, H, W, 3) float64, 0 to 255."""
    mean, std = torch.tensor(MEAN).double(), torch.tensor(STD).double()
    return (images.permute(0, 2, 3, 1).double() * std + mean) * 255


def reference(source: Batches, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the epoch's images and labels one by one, with Python numbers and slices."""
    draws, mixes = draws_of(source, epoch), source.augmentation.mixes
    images, labels = [], []
    for k in range(len(source) * source.batch_size):
        image, label = reference_image(source, draws, k), int(draws.order[k])
        if mixes:
            other = int(draws.partner[k])
            partner = reference_image(source, draws, other)
            first_row, last_row, first_column, last_column = draws.box[k].tolist()
            image = image * draws.outside[k] + partner * (1 - draws.outside[k])
            for i in range(first_row, last_row):
                for j in range(first_column, last_column):
                    image[i, j] = partner[i, j]
            weights = torch.zeros(NUMBER)
            weights[label] += draws.share[k]
            weights[int(draws.order[other])] += 1 - draws.share[k]
        images.append(torch.stack([(image[..., c] / 255 - MEAN[c]) / STD[c] for c in range(3)]))
        labels.append(weights if mixes else torch.tensor(label))
    return torch.stack(images), torch.stack(labels)


def reference_image(source: Batches, draws: SimpleNamespace, k: int) -> torch.Tensor:
    """Compute the k-th sample of the epoch on its own: (H, W, 3), where white is 255."""
    augmentation, pad = source.augmentation, source.augmentation.crop_pad
    original = source.images.pixels[draws.order[k]]
    height, width, _ = original.shape
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    for i in range(height):
        for j in range(width):
            row, column = i + int(draws.top[k]) - pad, j + int(draws.left[k]) - pad
            if augmentation.padding == "reflect":
                row = -row if row < 0 else 2 * height - 2 - row if row >= height else row
                column = -column if column < 0 else column
                column = 2 * width - 2 - column if column >= width else column
            if 0 <= row < height and 0 <= column < width:
                image[i, j] = original[row, column]
    if augmentation.flip and draws.mirrored[k]:
        image = torch.stack([image[:, j] for j in reversed(range(width))], dim=1)
    if augmentation.policy:  # each operation has its own test
        for operation, magnitude in zip(draws.operations[k], draws.magnitudes[k], strict=True):
            change = list(OPERATIONS.values())[operation]
            image = change(image[None], magnitude[None])[0]
    image = image.float()
    boxes = []
    if augmentation.cutout:
        row, column = (
            int(c[k]) - augmentation.cutout // 2 for c in (draws.cut_row, draws.cut_column)
        )
        boxes.append((row, row + augmentation.cutout, column, column + augmentation.cutout))
    if augmentation.erasing:
        boxes.append(draws.erased[k].tolist())
    for first_row, last_row, first_column, last_column in boxes:
        for i in range(max(first_row, 0), min(last_row, height)):
            for j in range(max(first_column, 0), min(last_column, width)):
                image[i, j] = 255 * torch.tensor(MEAN)
    return image


EVERYTHING = Augmentation(
    crop_pad=2, flip="alternating", cutout=3, padding="reflect", policy="rand", erasing=0.5,
    mixup=0.5, cutmix=1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(crop_pad=2),
        Augmentation(crop_pad=6, padding="reflect"),
        Augmentation(flip=True),
        Augmentation(flip="alternating"),
        Augmentation(cutout=4),
        Augmentation(cutout=5),
        Augmentation(crop_pad=3, flip=True, cutout=3),
        Augmentation(policy="trivial"),
        Augmentation(policy="rand", rand_ops=3, rand_magnitude=20),
        Augmentation(policy="auto"),
        Augmentation(erasing=0.5),
        Augmentation(mixup=0.3),
        Augmentation(cutmix=0.8),
        EVERYTHING,
    ],
    ids=lambda a: ",".join(
        f"{k}={v}" for k, v in vars(a).items() if v != getattr(Augmentation(), k)
    ),
)
def test_epoch_is_the_sample_by_sample_one(augmentation):
    source = batches(augmentation)
    images, labels = whole_epoch(source, epoch=2)
    expected_images, expected_labels = reference(source, 2)
    torch.testing.assert_close(images, expected_images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(labels, expected_labels, rtol=0, atol=1e-6)


def test_dtype_and_memory_format_of_a_batch():
    mixed, weights = next(batches(EVERYTHING).epoch(0))
    assert (weights.shape, weights.dtype) == ((5, NUMBER), torch.float32)
    for images, labels in (
        next(batches(Augmentation(1, True, 2)).epoch(0)),
        (mixed, weights.argmax(dim=1)),
        next(evaluation_batches(random_images(), 5, MEAN, STD)),
    ):
        assert images.shape == (5, 3, HEIGHT, WIDTH)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert not images.is_contiguous()
        assert (labels.shape, labels.dtype) == ((5,), torch.int64)


def test_incomplete_last_batch_is_dropped_and_no_image_comes_twice():
    source = batches(batch_size=5)
    assert len(source) == len(list(source.epoch(0))) == 5
    labels = whole_epoch(source)[1].tolist()
    assert len(set(labels)) == 25
    assert labels != sorted(labels)
    assert len(batches(batch_size=29)) == 1


def test_turning_one_augmentation_on_keeps_the_draws_of_the_others():
    alone = [
        Augmentation(crop_pad=2),
        Augmentation(crop_pad=2, padding="reflect"),
        Augmentation(crop_pad=2, flip="alternating"),
        Augmentation(crop_pad=2, policy="rand"),
        Augmentation(crop_pad=2, erasing=0.5),
        Augmentation(crop_pad=2, mixup=0.5, cutmix=1.0),
    ]
    together, seen = vars(draws_of(batches(EVERYTHING))), set()
    for augmentation in alone:
        draws = vars(draws_of(batches(augmentation)))
        if augmentation.flip != "alternating":
            del draws["mirrored"]
        for name, vector in draws.items():
            assert torch.equal(vector, together[name]), name
        seen |= draws.keys()
    assert seen == together.keys()
    assert torch.equal(draws_of(batches(Augmentation(flip=True))).mirrored,
                       draws_of(batches(Augmentation(2, True, 3, mixup=1.0))).mirrored)  # fmt: skip
    unpadded = vars(draws_of(batches(Augmentation(flip=True, cutout=3))))
    for name in ("order", "cut_row", "cut_column"):
        assert torch.equal(together[name], unpadded[name]), name


def test_a_flip_that_alternates_shows_each_image_once_each_way_in_two_epochs():
    source = batches(Augmentation(flip="alternating"), images=random_images(2000, 2, 3))
    sides = []
    for epoch in range(4):
        draws = draws_of(source, epoch)
        sides.append(draws.mirrored[draws.order.argsort()])
    first = sides[0]
    assert all(torch.equal(side, first ^ (epoch % 2 == 1)) for epoch, side in enumerate(sides))
    assert abs(first.float().mean() - 0.5) < 5 * 0.5 / 2000**0.5
    other = draws_of(batches(Augmentation(flip="alternating"), seed=4, images=source.images))
    assert not torch.equal(other.mirrored[other.order.argsort()], first)


def test_draws_reach_every_value_evenly():
    pad, number = 2, 7000
    images = random_images(number, 5, 3)
    draws = draws_of(batches(Augmentation(crop_pad=pad), images=images), 0)
    for vector, values in (
        (draws.top, 5), (draws.left, 5), (draws.mirrored.long(), 2),
        (draws.cut_row, 5), (draws.cut_column, 3),
    ):  # fmt: skip
        counts = torch.bincount(vector, minlength=values)
        assert len(counts) == values
        expected = number / values
        # Five standard deviations of a binomial count.
        assert (counts - expected).abs().max() < 5 * (expected * (1 - 1 / values)) ** 0.5
    assert not torch.equal(draws.top, draws.left)
    assert not torch.equal(draws.top, draws.cut_row)


@pytest.mark.parametrize(("seed", "epoch"), [(3, 1), (4, 0), (1, 3), (0, 3)])
def test_other_seeds_and_epochs_draw_differently(seed, epoch):
    everything = replace(EVERYTHING, flip=True)
    draws = draws_of(batches(everything, seed=3), 0)
    others = draws_of(batches(everything, seed=seed), epoch)
    for name, vector in vars(draws).items():
        assert not torch.equal(vector, getattr(others, name)), name


def test_the_draws_stay_the_same_from_version_to_version():
    # A run resumed by a later version must see the same images as before.
    draws = draws_of(batches(Augmentation(crop_pad=2), images=random_images(8)), 1)
    found = {name: vector.int().tolist() for name, vector in vars(draws).items()}
    assert found == {
        "order": [1, 5, 4, 2, 0, 6, 3, 7],
        "top": [4, 0, 4, 1, 3, 4, 2, 0],
        "left": [2, 2, 4, 3, 1, 0, 2, 3],
        "mirrored": [1, 1, 1, 1, 1, 1, 1, 0],
        "cut_row": [4, 0, 1, 3, 10, 1, 3, 7],
        "cut_column": [0, 1, 2, 5, 2, 0, 3, 3],
    }


def test_later_draws_stay_the_same_too():
    draws = draws_of(batches(EVERYTHING, images=random_images(8)), 1)
    found = {name: vector.tolist() for name, vector in vars(draws).items()}
    assert [int(side) for side in found["mirrored"]] == [1, 0, 0, 1, 1, 0, 1, 0]
    assert found["operations"][:4] == [[5, 9], [1, 10], [4, 3], [13, 8]]
    assert found["magnitudes"][0] == pytest.approx([9, 0.27])
    assert found["magnitudes"][2] == pytest.approx([-1.5, -0.95], abs=0.01)
    assert found["erased"][:2] == [[0, 0, 0, 0], [6, 10, 2, 5]]
    assert found["partner"] == [1, 4, 7, 5, 6, 2, 3, 0]
    assert found["box"][:2] == [[0, 0, 0, 0], [0, 2, 0, 2]]
    assert found["outside"][:3] == pytest.approx([0.31, 1, 0.87], abs=0.005)
    trivial = draws_of(batches(Augmentation(policy="trivial"), images=random_images(8)), 1)
    assert trivial.operations[:, 0].tolist() == [2, 4, 9, 5, 3, 0, 9, 3]
    auto = draws_of(batches(Augmentation(policy="auto"), images=random_images(8)), 1)
    assert auto.operations[:4].tolist() == [[8, 9], [7, 13], [12, 11], [0, 0]]


def test_an_epoch_repeats_whatever_was_drawn_before_and_leaves_the_global_generator_alone():
    source = batches(EVERYTHING)
    first = whole_epoch(source, epoch=1)
    whole_epoch(source, epoch=0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for again in (source, batches(EVERYTHING)):
        images, labels = whole_epoch(again, epoch=1)
        assert torch.equal(images, first[0])
        assert torch.equal(labels, first[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", range(6))
def test_resuming_gives_the_rest_of_the_epoch(start):
    source = batches(EVERYTHING)
    rest = list(source.epoch(1))[start:]
    resumed = list(source.epoch(1, start))
    assert len(resumed) == 5 - start
    for (x, y), (rx, ry) in zip(rest, resumed, strict=True):
        assert torch.equal(x, rx)
        assert torch.equal(y, ry)


def test_samples_do_not_depend_on_the_batch_size():
    small = whole_epoch(batches(EVERYTHING, batch_size=4))
    large = whole_epoch(batches(EVERYTHING, batch_size=12))
    for few, many in zip(small, large, strict=True):
        assert torch.equal(few[:24], many)


def test_the_images_themselves_stay_as_they_are():
    images = random_images()
    before = images.pixels.clone()
    whole_epoch(batches(EVERYTHING, images=images))
    whole_epoch(batches(images=images, batch_size=29))
    assert torch.equal(images.pixels, before)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_shards_of_several_ranks_make_up_the_micro_batches_of_one(micro_batches):
    whole = list(batches(EVERYTHING, 12).epoch(2))
    shards = [
        list(batches(EVERYTHING, 12, shard=(rank, 3), micro_batches=micro_batches).epoch(2))
        for rank in range(3)
    ]
    assert len(whole) == 2
    for batch, *shares in zip(whole, *shards, strict=True):
        for expected, got in zip(batch, zip(*shares, strict=True), strict=True):
            for number, micro_batch in enumerate(expected.chunk(micro_batches)):
                parts = [x.chunk(micro_batches)[number] for x in got]
                assert torch.equal(micro_batch, torch.cat(parts))
    with pytest.raises(ValueError, match=rf"batch_size=9 .* = 2 \* {micro_batches}$"):
        batches(batch_size=9, shard=(0, 2), micro_batches=micro_batches)


def test_shards_of_a_set_have_each_image_once():
    images = random_images()
    shards = [images.shard(rank, 4) for rank in range(4)]
    assert sorted(len(p) for p in shards) == [7, 7, 7, 8]
    labels = torch.cat([p.labels for p in shards])
    assert labels.sort().values.tolist() == list(range(NUMBER))
    assert all(torch.equal(p.pixels, images.pixels[p.labels]) for p in shards)


def test_evaluation_is_in_order_and_whole():
    images = random_images()
    drawn = list(evaluation_batches(images, 8, MEAN, STD))
    assert [len(y) for _, y in drawn] == [8, 8, 8, 5]
    assert torch.cat([y for _, y in drawn]).tolist() == list(range(NUMBER))
    pixels = to_pixels(torch.cat([x for x, _ in drawn]))
    torch.testing.assert_close(pixels, images.pixels.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch_size", [0, -3, NUMBER + 1])
def test_a_batch_size_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .*{NUMBER}"):
        batches(batch_size=batch_size)


def test_mistakes_are_reported_before_the_first_batch():
    with pytest.raises(ValueError, match="batch_size=0 "):
        evaluation_batches(random_images(), 0, MEAN, STD)
    for start in (-1, 6):
        with pytest.raises(ValueError, match=f"start={start} "):
            batches().epoch(0, start)
    with pytest.raises(ValueError, match="cutout=8 "):
        batches(Augmentation(cutout=8))
    assert inspect.isgenerator(batches().epoch(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_asked_back_from_the_device(policy):
    """Reading a value fails on the meta device; on a GPU, it would force a synchronization."""
    images = Images(*(t.to("meta") for t in vars(random_images(12, 8, 8)).values()))
    made = list(batches(replace(EVERYTHING, policy=policy), images=images).epoch(0))
    assert [x.shape for x, _ in made] == [(5, 3, 8, 8)] * 2
    assert all(x.is_meta and y.is_meta for x, y in made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_batches():
    here, labels = whole_epoch(batches(EVERYTHING))
    images = random_images().to("cuda")
    source = batches(EVERYTHING, images=images)
    next(source.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        there, labels_there = whole_epoch(source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.is_cuda
    torch.testing.assert_close(labels_there.cpu(), labels, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)
