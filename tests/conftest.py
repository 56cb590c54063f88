"""Settings and data small enough for a training step in a test, and what compares two runs."""

import csv
import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

# Without a GPU, Triton's kernels run in its interpreter. It must be asked for before anything
# imports triton, as torch's count of operations does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import train

# Networks this small run no faster on two threads, and the suite runs in two processes.
torch.set_num_threads(1)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# A network of three blocks on 96 images: a run of two epochs takes about a second.
TINY = [
    "experiment=lookup",
    "data.train_size=96",
    "data.test_size=40",
    "batch_size=32",
    "epochs=2",
    "model.widths=[4,8,8]",
    "model.stem=4",
    "model.aa={stages:[2,3],dk:0.5,dv:0.25,Nh:4,min_dkh:8}",
    "tracking=csv",
]

# What may differ between two runs of the same settings.
CLOCK = ("images_per_s", "peak_memory_mb", "seconds")


def rows(folder):
    """The lines of a run's metrics.csv but for what depends on the clock."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


@pytest.fixture
def settings(tmp_path):
    """A function from overrides to the settings of a tiny run below ``tmp_path``."""

    def make(*overrides, base=TINY):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("config", [*base, f"out_dir={tmp_path}", *overrides])

    return make


@pytest.fixture
def run(settings, tmp_path):
    """A function that trains a tiny run in ``tmp_path / folder`` and returns its summary."""

    def go(*overrides, folder="run", base=TINY):
        run_dir = tmp_path / folder
        run_dir.mkdir(exist_ok=True, parents=True)
        return train.train(settings(*overrides, base=base), run_dir)

    return go
