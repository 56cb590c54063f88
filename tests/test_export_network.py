"""scripts/export.py: programs for other tools, checked before they are written."""

import json

import pytest
import torch
from test_saved import describe, save

import models
from models import NoAttention
from scripts import export

from helpers import call, refused


@pytest.fixture(autouse=True)
def logging_goes_on(monkeypatch):
    monkeypatch.setattr(export.logging, "disable", lambda level: None)


@pytest.fixture
def network(tmp_path):
    return save(tmp_path / "network", describe(NoAttention()))


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_both_formats_give_the_networks_numbers_at_any_size(tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    folder = save(tmp_path / "network", describe())  # with attention
    call(export.main, folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        str(folder / "network.pt2"),
        str(folder / "network.onnx"),
    ]
    loaded = models.load(folder)
    extra = {"config.json": ""}
    program = torch.export.load(folder / "network.pt2", extra_files=extra).module()
    assert json.loads(extra["config.json"]) == loaded.description.model_dump()
    session = runtime.InferenceSession(folder / "network.onnx")
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == loaded.class_names
    assert json.loads(told["mean"]) == loaded.description.mean
    for size in [(1, 3, 16, 20), (4, 3, 24, 16), (2, 3, 40, 33)]:
        images = torch.randn(size)
        expected = loaded.network(images)
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_other_numbers_are_not_written(network, tmp_path, monkeypatch, capsys):
    def off_by_a_little(trained):
        return b"content", lambda x: trained.network(x) * (1 + 1e-3 * (x.shape[3] > 20))

    monkeypatch.setattr(export, "FORMATS", {"torch": off_by_a_little})
    words = [network, "--formats", "torch", "--out", tmp_path / "out"]
    line = refused(capsys, export.main, *words)
    assert "network.pt2 is not written: its logits are off by 0.001 of the largest" in line
    assert not (tmp_path / "out").exists()


def test_logits_that_are_all_zero_are_compared_too(network):
    trained = models.load(network)
    for parameter in trained.network.head.parameters():
        torch.nn.init.zeros_(parameter)
    assert export.largest_error(trained.network, trained) == 0
    assert export.largest_error(lambda x: trained.network(x) + 1e-3, trained) > export.ALLOWED


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "there is no nowhere"),
        (["{network}/config.json"], "is neither a .safetensors file nor a checkpoint"),
        (["{network}", "--out", "{network}/config.json"], "config.json is not a folder"),
        (["{network}", "--formats", "tflite"], "tflite"),
    ],
)
def test_mistakes_are_one_line(network, capsys, words, line):
    before = sorted(network.iterdir())
    words = [word.format(network=network) for word in words]
    assert line in refused(capsys, export.main, *words)
    assert sorted(network.iterdir()) == before


def test_a_library_that_is_missing_is_named(network, monkeypatch, capsys):
    def missing(trained):
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(export, "FORMATS", {"onnx": missing})
    line = refused(capsys, export.main, network, "--formats", "onnx")
    assert line.startswith("export.py: onnxruntime is not installed: pip install -c constraints")
