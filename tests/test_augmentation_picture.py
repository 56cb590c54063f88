"""scripts/augmentation.py: the picture shows the same images as the batches."""

from itertools import islice

import pytest
import torch
from matplotlib.image import imread

from benchmarks.batches import ALL
from data import make_lookup
from data.policies import OPERATIONS
from scripts import augmentation

from helpers import call, refused

LOOKUP = ["data=lookup", "data.train_size=9", "data.test_size=1"]


@pytest.mark.slow
def test_the_picture_of_all_augmentations(monkeypatch, tmp_path, capsys):
    drawn, draw = [], augmentation.draw

    def drawing(*columns):  # draws only two rows, to save time
        drawn.append(columns)
        return draw(*(dict(islice(rows.items(), 2)) for rows in columns))

    monkeypatch.setattr(augmentation, "draw", drawing)
    out = tmp_path / "all.png"
    call(augmentation.main, "--out", out, *LOOKUP)
    assert capsys.readouterr().out == f"written: {out}\n"
    assert imread(out).ndim == 3
    ((left, right),) = drawn
    assert list(left) == ALL
    assert ["Identity", *right] == list(OPERATIONS)
    plain = make_lookup(train_size=9, test_size=1).train.pixels
    assert all((plain == image).flatten(1).all(1).any() for image in left["none"])
    for name, images in (left | right).items():
        assert images.shape == (8, 32, 32, 3)
        assert images.dtype == torch.uint8
        if name in left:
            assert torch.equal(images, left["none"]) == (name == "none"), name
        else:  # operations with magnitudes have their largest effect at both ends
            assert not torch.equal(images[-1], left["none"][0]), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.svg"], "--out a.svg: the picture is a PNG file; give a name with .png"),
        (["--out", "a.png", "--show", "erasing=2"], "augmentation.erasing=2.0 must be at least 0"),
        (["+data.foo=1", "--out", "a.png"], "data.foo: unknown setting foo"),
        (["epochs=-3", "--out", "a.png"], "epochs=-3 must be at least 1"),
        (["--out", "a.png", "--show", "trivia"], "Could not find 'augmentation/trivia'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    monkeypatch, tmp_path, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, augmentation.main, *LOOKUP, *words)
    assert not list(tmp_path.iterdir())
