"""docs/tutorial.md: every command is run as printed, with smaller networks and fewer images."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app import run_app
from helpers import ROOT

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Defaults to change in a copy of the project, so that no command needs to be changed.
SMALLER = {
    "configs/data/lookup.yaml": {
        "train_size: 10000": "train_size: 564",
        "test_size: 2000": "test_size: 16",
    },
    "configs/experiment/lookup.yaml": {
        "epochs: 4": "epochs: 1",
        "batch_size: 32": "batch_size: 16",
    },
    "configs/model/resnet20.yaml": {
        "widths: [16, 32, 64]": "widths: [4, 8, 8]",
        "stem: 16": "stem: 4",
    },
}
PYTHON = ".venv/bin/python"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project with smaller defaults."""
    place = tmp_path_factory.mktemp("clone")
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("results/", "tests/")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    for name, changes in SMALLER.items():
        text = (place / name).read_text()
        for before, after in changes.items():
            assert text.count(before) == 1, f"{name}: {before}"
            text = text.replace(before, after)
        (place / name).write_text(text)
    return place


def run(words, clone):
    options = {"cwd": clone, "env": os.environ | {"WANDB_MODE": "disabled"}, "timeout": 900}
    # max_minutes counts from the start of the process, and a fork's start is long ago.
    if any("max_minutes" in word for word in words):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    else:
        done = run_app(words, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def as_a_shell_reads(command, clone):
    """Return the words of a command after the shell has removed quotes and expanded ``*``."""
    command = ["bash", "-c", f"printf '%s\\0' {command}"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.thorough
@pytest.mark.long
def test_every_command_does_what_the_page_says(clone):
    outputs = {}
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
    for kind, text in blocks:
        if kind == "python":
            outputs[text] = run(["-c", text], clone)
            continue
        for line in text.splitlines():
            command = line.replace("make compare", f"{PYTHON} scripts/compare.py")
            python, *words = as_a_shell_reads(command, clone)
            assert python == PYTHON
            outputs[line] = run(words, clone)
    first = outputs["make compare"]
    (three,) = (text for kind, text in blocks if "scripts/evaluate.py outputs/compare" in text)
    said = [line.partition("  #")[0].strip() for line in first.partition("next:\n")[2].splitlines()]
    shown = [line.replace(sys.executable, PYTHON) for line in said]
    # compare.py prints its default arguments, which the page omits.
    shown[2] = shown[2].replace(" --vary attention=none,aa -- experiment=lookup", "")
    assert shown == three.splitlines()
    words = {name: [line for line in outputs if name in line] for name in ("max_minutes", "resume")}
    assert "stopped (" in outputs[words["max_minutes"][0]]
    assert "epoch 1/1" in outputs[words["resume"][0]]
    (sweep,) = (line for line in outputs if " -m " in line)
    assert outputs[sweep].count("done: val top-1") == 8
    (fine,) = (line for line in outputs if "freeze" in line)
    assert "parameters taken" in outputs[fine]
    assert "head  weight, bias: newly initialized: the source has 8 other classes" in outputs[fine]
    made = {str(path.relative_to(clone / "outputs")) for path in Path(clone / "outputs").rglob("*")}
    run_of_aa = "compare/experiment=lookup/attention=aa/seed=0"
    for name in ("network.onnx", "network.pt2", "weights.safetensors", "metrics.csv"):
        assert f"{run_of_aa}/{name}" in made
    assert any(name.startswith(f"{run_of_aa}/attention/") for name in made)
    assert "heads/report.html" in made
