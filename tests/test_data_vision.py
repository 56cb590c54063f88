import subprocess
import sys
from types import ModuleType

import pytest
import torch

from data import vision


class Importer:
    """Stands for importlib.import_module; raises ``errors`` in turn, then returns a module."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[str] = []
        self.module = ModuleType("torchvision.datasets")

    def __call__(self, name: str) -> ModuleType:
        self.asked.append(name)
        if self.errors:
            raise self.errors.pop(0)
        return self.module


@pytest.fixture
def repairs(monkeypatch):
    """The repairs made, in order, in place of making them."""
    made: list[str] = []
    monkeypatch.setattr(vision, "_forget_torchvision", lambda: made.append("forget"))
    monkeypatch.setattr(vision, "_declare_operators", lambda: made.append("declare"))
    return made


def test_the_cifar_classes_are_there():
    assert vision.datasets.CIFAR100.base_folder == "cifar-100-python"


def test_a_matching_pair_is_imported_once_and_nothing_is_repaired(repairs):
    importer = Importer()
    assert vision.import_datasets(importer) is importer.module
    assert importer.asked == ["torchvision.datasets"]
    assert repairs == []


def test_the_known_error_is_repaired_and_the_import_repeated(repairs):
    importer = Importer(RuntimeError("operator torchvision::nms does not exist"))
    assert vision.import_datasets(importer) is importer.module
    assert importer.asked == ["torchvision.datasets"] * 2
    assert repairs == ["forget", "declare"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::roi_align does not exist"),
        ImportError("operator torchvision::nms does not exist"),
        ModuleNotFoundError("No module named 'torchvision'"),
    ],
)
def test_any_other_error_is_passed_on(repairs, error):
    with pytest.raises(type(error)) as caught:
        vision.import_datasets(Importer(error))
    assert caught.value is error
    assert repairs == []


def test_an_error_of_the_second_import_is_passed_on(repairs):
    known = RuntimeError("operator torchvision::nms does not exist")
    with pytest.raises(RuntimeError, match="something else"):
        vision.import_datasets(Importer(known, RuntimeError("something else")))


def test_forgetting_drops_torchvision_alone(monkeypatch):
    kept = ("torchvision_extra", "other.torchvision")
    dropped = ("torchvision", "torchvision.made.up")
    modules = {name: ModuleType(name) for name in (*kept, *dropped)}
    monkeypatch.setattr(sys, "modules", modules)
    vision._forget_torchvision()
    assert sorted(modules) == sorted(kept)


def test_declared_operators_exist_afterwards():
    # In a process of its own: a real torchvision here may have declared them already.
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
