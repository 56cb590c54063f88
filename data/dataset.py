"""Types that all data sets share, and the split into training and held-out images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """RGB images with their labels: ``pixels`` (N, H, W, 3) uint8 and ``labels`` (N,) int64.

    Raises ValueError if either has another dtype or shape.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_dtype("pixels", self.pixels, torch.uint8)
        _check_dtype("labels", self.labels, torch.int64)
        shape = tuple(self.pixels.shape)
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError(
                f"pixels has shape {shape}; expected (N, H, W, 3), RGB with the channels last"
                f"{_shape_hint(shape)}"
            )
        if tuple(self.labels.shape) != shape[:1]:
            raise ValueError(
                f"labels has shape {tuple(self.labels.shape)}; expected {shape[:1]}, "
                f"one label for each of the {shape[0]} images in pixels"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """The same images with both tensors on ``device``."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def shard(self, rank: int, world_size: int) -> Images:
        """Images ``rank``, ``rank + world_size``, ...: over all ranks, each image exactly once."""
        return Images(self.pixels[rank::world_size], self.labels[rank::world_size])

    def select(self, indices: list[int] | Tensor) -> Images:
        """The images at these indices, in this order."""
        return Images(self.pixels[indices], self.labels[indices])


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; expected a tensor of {dtype}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {dtype}")


def _shape_hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return "; for gray images repeat the one channel three times"
    if len(shape) == 4 and shape[1] == 3:
        return "; use pixels.permute(0, 2, 3, 1)"
    return ""


@dataclass(frozen=True)
class Dataset:
    """A training set, images to evaluate on, and what both have in common.

    ``evaluated_on`` is "test", or "val" if ``evaluation`` was held out of the training images or is
    the validation part of a folder.
    ``mean`` and ``std`` normalize the pixels, per channel, on a scale where white is 1; they are
    those of all training images, including held-out ones.
    ``digest`` identifies the images: data sets with the same digest train and evaluate on the same
    images with the same labels, even if versions of Pillow decode their files differently. By
    default it is computed from pixels and labels.
    ``notes`` are lines about the source of the images, such as files that were left out.

    Raises ValueError if the fields contradict each other, for example if a label is not from 0 to
    num_classes - 1.
    """

    name: str
    train: Images
    evaluation: Images
    evaluated_on: str
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.evaluated_on not in ("test", "val"):
            raise ValueError(f"evaluated_on={self.evaluated_on!r} is unknown; give 'test' or 'val'")
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names; "
                f"expected num_classes={self.num_classes} of them"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(
                f"mean={self.mean} and std={self.std} must have three values each, "
                "those of std above 0"
            )
        train_size, size = (tuple(i.pixels.shape[1:3]) for i in (self.train, self.evaluation))
        if train_size != size:
            raise ValueError(
                f"the images of evaluation are {size[0]}x{size[1]}; "
                f"expected {train_size[0]}x{train_size[1]} as in train"
            )
        _check_labels("train", self.train.labels, self.num_classes)
        _check_labels("evaluation", self.evaluation.labels, self.num_classes)
        if not self.digest:
            object.__setattr__(self, "digest", _digest_of_images(self.train, self.evaluation))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.pixels.shape[1], self.train.pixels.shape[2]

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with all its images on ``device``."""
        return replace(self, train=self.train.to(device), evaluation=self.evaluation.to(device))


@dataclass(frozen=True)
class EvaluationSet:
    """Images to score a trained network on; their labels are indices of its ``class_names``.

    ``evaluated_on`` is "test" or "val" as in `Dataset`; ``files`` are the paths of the images if
    each has its own file.
    """

    name: str
    evaluation: Images
    evaluated_on: str
    class_names: tuple[str, ...]
    files: tuple[str, ...] = ()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.evaluation.pixels.shape[1], self.evaluation.pixels.shape[2]


def _check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    if not len(labels):
        raise ValueError(f"{name} has no images; give at least one")
    if labels.is_meta:  # a meta tensor has no values
        return
    lowest, highest = labels.min().item(), labels.max().item()
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"the labels of {name} go from {lowest} to {highest}; "
            f"expected 0 to {num_classes - 1}, since num_classes={num_classes}"
        )


def digest_of(parts: Iterable[str | bytes]) -> str:
    """16 hexadecimal digits that identify these parts in this order."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _digest_of_images(*splits: Images) -> str:
    tensors = [tensor for images in splits for tensor in (images.pixels, images.labels)]
    arrays = [tensor.cpu().contiguous().numpy() for tensor in tensors]
    return digest_of(part for a in arrays for part in (str(a.shape), a.tobytes()))


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with a 4-byte BLAKE2b digest of ``parts`` joined by ":".

    Four bytes, because the CPU generator ignores the upper half of a 64-bit seed.
    """
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def check_val_size(val_size: int, train_size: int) -> None:
    """Raise ValueError unless ``val_size`` images can be held out of ``train_size``."""
    if not 0 <= val_size < train_size:
        raise ValueError(
            f"val_size={val_size} cannot be held out of {train_size} training images; "
            f"give 0 (evaluate on the test set) to {train_size - 1}"
        )


def hold_out(train: Images, size: int) -> tuple[Images, Images]:
    """Split off ``size`` random images; return the rest and these, both in their original order.

    Which images are held out depends only on ``len(train)`` and ``size``, so that runs with
    different seeds are evaluated on the same images. ``size`` must pass `check_val_size`.
    """
    order = torch.randperm(len(train), generator=seeded_generator("hold-out"))
    order = order.to(train.labels.device)
    held_out, rest = order[:size].sort().values, order[size:].sort().values
    return train.select(rest), train.select(held_out)


def hold_out_by_class(labels: list[int], size: int) -> list[int]:
    """Sorted indices of ``size`` random images, from each class in proportion to its size.

    Each class keeps an image to train on. Which images are held out depends only on ``labels`` and
    ``size``. Raises ValueError if ``size`` is below 1 or too large for that.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    most = len(labels) - len(members)
    if not 1 <= size <= most:
        raise ValueError(
            f"val_size={size} cannot be held out of {len(labels)} training images of "
            f"{len(members)} classes, each of which must keep one; give 0 (evaluate on images of "
            f"their own) to {most}"
        )
    shares = {label: divmod(size * len(own), len(labels)) for label, own in members.items()}
    quotas = {label: min(share, len(members[label]) - 1) for label, (share, _) in shares.items()}
    # What rounding leaves over goes, one image each, to the classes that lost most by it.
    by_loss = sorted(members, key=lambda label: (-shares[label][1], label))
    while (left := size - sum(quotas.values())) > 0:
        open_ = [label for label in by_loss if quotas[label] < len(members[label]) - 1]
        for label in open_[:left]:
            quotas[label] += 1
    held_out = []
    for label, own in members.items():
        order = torch.randperm(len(own), generator=seeded_generator("hold-out", label))
        held_out += [own[index] for index in order[: quotas[label]].tolist()]
    return sorted(held_out)
