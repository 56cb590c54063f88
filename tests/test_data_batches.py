import inspect

import pytest
import torch

from data import Augmentation, Batches, Images, evaluation_batches

NUMBER, HEIGHT, WIDTH = 29, 11, 7
MEAN, STD = (0.3, 0.5, 0.7), (0.2, 0.25, 0.4)


def random_images(number: int = NUMBER, height: int = HEIGHT, width: int = WIDTH) -> Images:
    generator = torch.Generator().manual_seed(5)
    # No zeros: any that turns up comes from padding.
    pixels = torch.randint(1, 256, (number, height, width, 3), generator=generator)
    return Images(pixels.to(torch.uint8), torch.arange(number))


def batches(augmentation=None, batch_size=5, seed=3, images=None) -> Batches:
    return Batches(
        images or random_images(), batch_size, augmentation or Augmentation(), MEAN, STD, seed
    )


def whole_epoch(source: Batches, epoch: int = 0, start: int = 0):
    drawn = list(source.epoch(epoch, start))
    return torch.cat([x for x, _ in drawn]), torch.cat([y for _, y in drawn])


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Undoes the normalization: (B, H, W, 3) float64, 0 to 255."""
    mean, std = torch.tensor(MEAN).double(), torch.tensor(STD).double()
    return (images.permute(0, 2, 3, 1).double() * std + mean) * 255


def reference(source: Batches, epoch: int) -> list[torch.Tensor]:
    """The epoch's images, one by one with Python numbers and slices: (3, H, W) each."""
    augmentation, pad = source.augmentation, source.augmentation.crop_pad
    draws = source._draw(epoch)
    made = []
    for k, index in enumerate(draws.order.tolist()):
        height, width, _ = source.images.pixels[index].shape
        padded = torch.zeros(height + 2 * pad, width + 2 * pad, 3)
        padded[pad : pad + height, pad : pad + width] = source.images.pixels[index]
        top, left = int(draws.top[k]), int(draws.left[k])
        image = padded[top : top + height, left : left + width].clone()
        if augmentation.flip and draws.mirrored[k]:
            image = torch.stack([image[:, j] for j in reversed(range(width))], dim=1)
        if augmentation.cutout:
            first_row = int(draws.cut_row[k]) - augmentation.cutout // 2
            first_column = int(draws.cut_column[k]) - augmentation.cutout // 2
            for i in range(first_row, first_row + augmentation.cutout):
                for j in range(first_column, first_column + augmentation.cutout):
                    if 0 <= i < height and 0 <= j < width:
                        image[i, j] = 255 * torch.tensor(MEAN)
        made.append(torch.stack([(image[..., c] / 255 - MEAN[c]) / STD[c] for c in range(3)]))
    return made[: len(source) * source.batch_size]


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(crop_pad=2),
        Augmentation(flip=True),
        Augmentation(cutout=4),
        Augmentation(cutout=5),
        Augmentation(crop_pad=3, flip=True, cutout=3),
    ],
    ids=str,
)
def test_epoch_is_the_sample_by_sample_one(augmentation):
    source = batches(augmentation)
    images, labels = whole_epoch(source, epoch=2)
    torch.testing.assert_close(images, torch.stack(reference(source, 2)), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == source._draw(2).order[:25].tolist()


def test_dtype_and_memory_format_of_a_batch():
    for images, labels in (
        next(batches(Augmentation(1, True, 2)).epoch(0)),
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


def test_every_option_changes_what_it_names_and_leaves_the_rest():
    plain, order = whole_epoch(batches())
    cropped = to_pixels(whole_epoch(batches(Augmentation(crop_pad=2)))[0])
    flipped, flip_order = whole_epoch(batches(Augmentation(flip=True)))
    cut, cut_order = whole_epoch(batches(Augmentation(cutout=4)))
    assert order.tolist() == flip_order.tolist() == cut_order.tolist()

    assert (cropped.round() == 0).any()
    assert not (to_pixels(plain).round() == 0).any()

    mirrored = [torch.equal(f, p.flip(2)) for f, p in zip(flipped, plain, strict=True)]
    same = [torch.equal(f, p) for f, p in zip(flipped, plain, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)

    changed = (cut != plain).any(1)
    assert (cut[changed[:, None].expand_as(cut)] == 0).all()
    sizes = changed.flatten(1).sum(1)
    assert sizes.max() == 16
    assert sizes.min() >= 4


def test_turning_one_augmentation_on_keeps_the_draws_of_the_others():
    alone = batches(Augmentation(crop_pad=2))._draw(0)
    together = batches(Augmentation(crop_pad=2, flip=True, cutout=4))._draw(0)
    for name, vector in vars(alone).items():
        assert torch.equal(vector, getattr(together, name)), name
    unpadded = batches(Augmentation(flip=True))._draw(0)
    for name in ("order", "mirrored", "cut_row", "cut_column"):
        assert torch.equal(getattr(alone, name), getattr(unpadded, name)), name


def test_draws_reach_every_value_evenly():
    pad, number = 2, 7000
    images = random_images(number, 5, 3)
    draws = batches(Augmentation(crop_pad=pad), images=images)._draw(0)
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
    draws, others = batches(seed=3)._draw(0), batches(seed=seed)._draw(epoch)
    for name in ("order", "mirrored", "cut_row", "cut_column"):
        assert not torch.equal(getattr(draws, name), getattr(others, name)), name


def test_the_draws_stay_the_same_from_version_to_version():
    # A run continued by a later version must see the images that it would have seen.
    draws = batches(Augmentation(crop_pad=2), images=random_images(8))._draw(1)
    found = {name: vector.int().tolist() for name, vector in vars(draws).items()}
    assert found == {
        "order": [1, 5, 4, 2, 0, 6, 3, 7],
        "top": [4, 0, 4, 1, 3, 4, 2, 0],
        "left": [2, 2, 4, 3, 1, 0, 2, 3],
        "mirrored": [1, 1, 1, 1, 1, 1, 1, 0],
        "cut_row": [4, 0, 1, 3, 10, 1, 3, 7],
        "cut_column": [0, 1, 2, 5, 2, 0, 3, 3],
    }


def test_an_epoch_repeats_whatever_was_drawn_before():
    augmentation = Augmentation(2, True, 3)
    source = batches(augmentation)
    first = whole_epoch(source, epoch=1)
    whole_epoch(source, epoch=0)
    torch.manual_seed(99)
    for again in (source, batches(augmentation)):
        images, labels = whole_epoch(again, epoch=1)
        assert torch.equal(images, first[0])
        assert torch.equal(labels, first[1])


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    whole_epoch(batches(Augmentation(2, True, 3)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", range(6))
def test_resuming_gives_the_rest_of_the_epoch(start):
    source = batches(Augmentation(2, True, 3))
    rest = list(source.epoch(1))[start:]
    resumed = list(source.epoch(1, start))
    assert len(resumed) == 5 - start
    for (x, y), (rx, ry) in zip(rest, resumed, strict=True):
        assert torch.equal(x, rx)
        assert torch.equal(y, ry)


def test_samples_do_not_depend_on_the_batch_size():
    augmentation = Augmentation(2, True, 3)
    small = whole_epoch(batches(augmentation, batch_size=4))[0]
    large = whole_epoch(batches(augmentation, batch_size=12))[0]
    assert torch.equal(small[:24], large)


def test_the_images_themselves_stay_as_they_are():
    images = random_images()
    before = images.pixels.clone()
    whole_epoch(batches(Augmentation(2, True, 3), images=images))
    whole_epoch(batches(images=images, batch_size=29))
    assert torch.equal(images.pixels, before)


def test_the_shards_of_several_ranks_make_up_the_batches_of_one():
    augmentation = Augmentation(crop_pad=2, flip=True, cutout=3)
    whole = list(batches(augmentation, 6).epoch(2))
    shards = [
        list(Batches(random_images(), 6, augmentation, MEAN, STD, 3, shard=(rank, 3)).epoch(2))
        for rank in range(3)
    ]
    assert len(whole) == 4
    for batch, *shares in zip(whole, *shards, strict=True):
        for expected, got in zip(batch, zip(*shares, strict=True), strict=True):
            assert torch.equal(expected, torch.cat(got))
    with pytest.raises(ValueError, match=r"batch_size=5 must be divisible by .* = 3 \* 1"):
        Batches(random_images(), 5, augmentation, MEAN, STD, 3, shard=(0, 3))
    with pytest.raises(ValueError, match=r"batch_size=9 must be divisible by .* = 3 \* 2"):
        Batches(random_images(), 9, augmentation, MEAN, STD, 3, shard=(0, 3), micro_batches=2)


def test_each_micro_batch_is_sharded_by_itself():
    augmentation = Augmentation(crop_pad=2, flip=True)
    whole = list(batches(augmentation, 12).epoch(1))
    shards = [
        list(
            Batches(
                random_images(), 12, augmentation, MEAN, STD, 3, shard=(rank, 3), micro_batches=2
            ).epoch(1)
        )
        for rank in range(3)
    ]
    for batch, *shares in zip(whole, *shards, strict=True):
        for expected, got in zip(batch, zip(*shares, strict=True), strict=True):
            for number, micro_batch in enumerate(expected.chunk(2)):
                assert torch.equal(micro_batch, torch.cat([x.chunk(2)[number] for x in got]))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_batches():
    augmentation = Augmentation(2, True, 3)
    here, labels = whole_epoch(batches(augmentation))
    there, labels_there = whole_epoch(batches(augmentation, images=random_images().to("cuda")))
    assert there.is_cuda
    assert labels.tolist() == labels_there.tolist()
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)
