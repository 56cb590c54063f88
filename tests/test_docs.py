"""The Python code in README and docs runs as printed, and prints what its comments say."""

import re

import pytest
import torch
from torch import nn

from data import vision
from scripts import augment_example

from helpers import ROOT, call

assert vision.datasets  # makes torchvision importable
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [
    page
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    if "```python" in page.read_text() and page.name != "tutorial.md"  # test_tutorial.py
]


def anchors(page):
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name
)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def small_network():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1))


@pytest.mark.slow
# Warnings from the exporters and torchvision.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    # Names that the pages assume to be defined.
    names = {"network": small_network(), "example_images": torch.zeros(1, 3, 16, 16)}
    for block in BLOCK.findall(page.read_text()):
        exec(block, names)
        for line in block.splitlines():
            shape = re.fullmatch(r"(\S.*\.shape)  # (\([\d, ]+\)).*", line)
            if shape:
                assert str(tuple(eval(shape[1], names))) == shape[2]
            printed = re.fullmatch(r"print\(.*\)  # (.*)", line)
            if printed:
                assert capsys.readouterr().out.rstrip("\n").endswith(printed[1])


def test_the_report_that_the_page_shows_is_the_real_one():
    from torchvision.models import resnet50

    from aaconv import augment_

    page = (ROOT / "docs" / "layer.md").read_text()
    shown = re.search(r"^    convolution  .*?^    13 of 53 [^\n]*", page, re.DOTALL | re.MULTILINE)
    with torch.device("meta"):
        network = resnet50(weights=None)
    report = augment_(network, torch.zeros(1, 3, 224, 224, device="meta"))
    lines = str(report).splitlines()
    for line in shown[0].splitlines():
        assert line.strip() == "..." or line.removeprefix("    ") in lines


def test_the_example_of_training_on(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        augment_example, "accuracy", lambda network, data: seen.append(network) or 7
    )
    words = ["--epochs", 1, "--epochs-after", 1, "--train-size", 64]
    call(augment_example.main, *words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "plain, 1 epochs",
        "augmented, not trained on",
        "augmented, 1 epochs more",
        "plain, 1 epochs more",
    ]
    augmented = [hasattr(network.stages[2][0].conv1, "qkv_conv") for network in seen]
    assert augmented == [True, True, True, False]  # the first network became the second
    assert seen[0] is seen[1] is seen[2] is not seen[3]


def test_the_examples_accuracy_is_a_percentage():
    data = augment_example.make_lookup(train_size=32, test_size=13)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, data.num_classes))
    nn.init.zeros_(network[1].weight)
    with torch.no_grad():
        network[1].bias.copy_(torch.arange(8.0))
    share = sum(int(label) == 7 for label in data.evaluation.labels) / 13
    assert augment_example.accuracy(network, data) == pytest.approx(100 * share)
