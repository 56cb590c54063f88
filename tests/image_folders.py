"""Image folders for the tests of data=folder."""

import numpy as np
from PIL import Image

from data import load_folder

CLASSES = ["ant", "Bee", "c d", "Käfer"]
# Settings of a run on these images.
RUN = ["data.size=8", "augmentation.crop_pad=2", "batch_size=4", "epochs=1", "model=resnet8"]
RUN += ["tracking=csv", "precision=fp32", "model.stem=4", "model.widths=[4,8,8]"]


def write(path, size=(9, 7), seed=0, mode="RGB"):
    """Write an image of size (width, height) with random pixels; return the pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def write_folder(tmp_path, monkeypatch):
    """Write four classes of three images to train/, and one of each but the last to val/."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "my images"
    for number, name in enumerate(CLASSES):
        for image in range(3):
            write(root / "train" / name / f"{image}.png", seed=10 * number + image)
        if number < 3:
            write(root / "val" / name / "x.png", seed=100 + number)
    return root


def load(root, **settings):
    """Load the data set, by default with images of 8x8."""
    return load_folder(str(root), "mine", **{"size": 8, **settings})
