"""Classes with unequal numbers of images: weights in the loss, and balanced sampling."""

from collections import Counter

import pytest
import torch

from data import Augmentation, Batches, Images
from data.batches import balanced_order
from training.loss import class_weights, cross_entropy, relative_weights

COUNTS = {0: 1, 2: 30, 3: 6, 7: 2}  # class 1 and some others have no images
LABELS = torch.tensor([label for label, count in COUNTS.items() for _ in range(count)])
IMAGES = Images(torch.zeros(39, 2, 2, 3, dtype=torch.uint8), LABELS)


def test_a_balanced_order_has_each_class_equally_often_and_repeats_as_little_as_it_can():
    orders = [balanced_order(LABELS, torch.Generator().manual_seed(seed)) for seed in range(4)]
    for order in orders:
        assert len(order) == 39
        by_class = Counter(LABELS[order].tolist())
        assert sorted(by_class.values()) == [9, 10, 10, 10]
        by_image = Counter(order.tolist())
        for label, count in COUNTS.items():
            often = [by_image[i] for i in range(39) if LABELS[i] == label]
            assert max(often) - min(often) <= 1
            assert sum(often) == by_class[label]
            assert len(often) == count
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_a_balanced_epoch_leaves_the_other_draws_as_they_are():
    order = balanced_order(LABELS, torch.Generator().manual_seed(1))
    augmentation = Augmentation(crop_pad=2, policy="rand", erasing=0.5, mixup=1, cutmix=1)
    plain, balanced = (augmentation.draw(39, (8, 8), 3, 2, given) for given in (None, order))
    assert sorted(plain.pop("order").tolist()) == list(range(39))
    assert torch.equal(balanced.pop("order"), order)
    assert plain.keys() == balanced.keys()
    assert all(torch.equal(drawn, balanced[name]) for name, drawn in plain.items())


def test_an_alternating_flip_is_of_the_image_however_often_it_is_drawn():
    augmentation, sides = Augmentation(flip="alternating"), {}
    for epoch in range(2):
        order = balanced_order(LABELS, torch.Generator().manual_seed(epoch))
        drawn = augmentation.draw(39, (8, 8), 3, epoch, order)
        for image, mirrored in zip(order.tolist(), drawn["mirrored"].tolist(), strict=True):
            assert sides.setdefault(image, mirrored ^ epoch % 2) == mirrored ^ epoch % 2


def test_the_batches_of_a_balanced_epoch_have_each_class_equally_often():
    color = (0.5, 0.5, 0.5)
    batches = Batches(IMAGES, 13, Augmentation(), color, color, 3, balanced=True)
    drawn = Counter(label for _, labels in batches.epoch(2) for label in labels.tolist())
    assert sorted(drawn.values()) == [9, 10, 10, 10]


def test_balanced_weights_give_each_class_as_much():
    weights = class_weights("balanced", IMAGES, 8)
    shares = [weights[label] * count for label, count in COUNTS.items()]
    assert shares == pytest.approx([39 / 8] * 4)
    assert weights.isfinite().all()
    assert class_weights(None, IMAGES, 8) is None


def test_soft_labels_weigh_by_their_classes():
    """A mixed image counts like two images, one of each class, weighted by its labels."""
    logits, weights = torch.randn(3, 4), torch.tensor([1.0, 2.0, 4.0, 0.5])
    soft = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 1, 0], [0.5, 0, 0, 0.5]])
    got = cross_entropy(logits, soft, 0.1, relative_weights(soft, weights))
    total, expected = 0.0, 0.0
    for z, target in zip(logits, soft, strict=True):
        weight = sum(float(t * w) for t, w in zip(target, weights, strict=True))
        smooth = 0.9 * target + 0.1 / 4
        expected += weight * -(smooth * z.log_softmax(0)).sum().item()
        total += weight
    assert got.item() == pytest.approx(expected / total, rel=1e-5)
    hard = torch.tensor([1, 2, 0])
    same = torch.nn.functional.one_hot(hard, 4).float()
    assert torch.equal(relative_weights(hard, weights), relative_weights(same, weights))
