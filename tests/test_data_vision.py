import subprocess
import sys
from types import ModuleType
from unittest.mock import Mock, call

import pytest
import torch

from data import vision

KNOWN = RuntimeError("operator torchvision::nms does not exist")
MODULE = ModuleType("torchvision.datasets")


@pytest.fixture
def repairs(monkeypatch):
    """A list that records the repairs, in order, instead of making them."""
    made: list[str] = []
    monkeypatch.setattr(vision, "_forget_torchvision", lambda: made.append("forget"))
    monkeypatch.setattr(vision, "_declare_operators", lambda: made.append("declare"))
    return made


@pytest.mark.parametrize(
    ("errors", "made"), [([], []), ([KNOWN], ["forget", "declare"])], ids=["none", "the known one"]
)
def test_the_import_is_repaired_and_repeated_after_the_known_error_alone(
    repairs, monkeypatch, errors, made
):
    importer = Mock(side_effect=[*errors, MODULE])
    monkeypatch.setattr(vision, "import_module", importer)
    assert vision.import_datasets() is MODULE
    assert importer.call_args_list == [call("torchvision.datasets")] * (1 + len(errors))
    assert repairs == made


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::roi_align does not exist"),
        ImportError("operator torchvision::nms does not exist"),
        ModuleNotFoundError("No module named 'torchvision'"),
    ],
)
def test_any_other_error_is_passed_on(repairs, monkeypatch, error):
    for before, made in (([], []), ([KNOWN], ["forget", "declare"])):
        monkeypatch.setattr(vision, "import_module", Mock(side_effect=[*before, error]))
        with pytest.raises(type(error)) as caught:
            vision.import_datasets()
        assert caught.value is error
        assert repairs == made


def test_forgetting_drops_torchvision_alone(monkeypatch):
    kept = ("torchvision_extra", "other.torchvision")
    dropped = ("torchvision", "torchvision.made.up")
    modules = {name: ModuleType(name) for name in (*kept, *dropped)}
    monkeypatch.setattr(sys, "modules", modules)
    vision._forget_torchvision()
    assert sorted(modules) == sorted(kept)


def test_declared_operators_exist_afterwards():
    # In a separate process, because a real torchvision may have declared them in this one.
    script = (
        "import torch; from torch.library import Library\n"
        "import types, sys; sys.modules['torchvision'] = types.ModuleType('torchvision')\n"
        "sys.modules['torchvision.datasets'] = types.ModuleType('torchvision.datasets')\n"
        "from data import vision\n"
        "assert not vision._declared and not hasattr(torch.ops.torchvision, 'nms')\n"
        "vision._declare_operators()\n"
        "assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_only_a_torchvision_without_its_operators_is_repaired():
    from torchvision.extension import _has_ops

    assert len(vision._declared) == (0 if _has_ops() else 1)
    assert torch.ops.torchvision.nms is not None
