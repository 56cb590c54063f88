"""Fixtures that compose settings and train tiny runs."""

import logging
import os
import signal
import subprocess
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter, which must be enabled before anything
# imports triton (torch's FLOP counter does).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import train
from training import launch
from training.compose import compose_config

import app
from helpers import TINY
from image_folders import write_folder
from wandb_server import ServerProcess

# A shell that starts the tests in the background makes them ignore SIGINT, and so would all the
# processes that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Such small networks are no faster on two threads, and the suite runs in two processes.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def server_of_commands():
    """Stop the server of `app.App` and its processes at the end of the tests."""
    yield
    app.stop_server()


@pytest.fixture(autouse=True)
def hang_guard():
    """Fail a test that hangs (for example on opening a named pipe) after half an hour."""

    def hang(*_):
        pytest.fail("still waiting after half an hour")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(1800)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def own_wandb_process(monkeypatch):
    """Keep a test's processes from using the wandb process that an earlier test left running."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


@pytest.fixture(autouse=True)
def own_log_handlers():
    """Remove handlers that commands called in this process added: their streams get closed."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


@cache
def composed(words):
    """Compose the settings for these words, cached because many tests share them."""
    return compose_config(words)


@pytest.fixture
def settings(tmp_path):
    """A function that returns the settings of a tiny run below ``tmp_path`` with overrides."""

    def make(*overrides, base=TINY):
        cfg = deepcopy(composed((*base, *overrides)))
        cfg.out_dir = str(tmp_path)
        return cfg

    return make


@pytest.fixture
def run(settings, tmp_path):
    """A function that trains a tiny run in ``tmp_path / folder`` and returns its summary."""

    def go(*overrides, folder="run", base=TINY):
        run_dir = tmp_path / folder
        run_dir.mkdir(exist_ok=True, parents=True)
        return train.train(settings(*overrides, base=base), run_dir)

    return go


@pytest.fixture
def steps(monkeypatch):
    """A list that gets an item for each training step from now on."""
    taken, step = [], train.take_step
    monkeypatch.setattr(train, "take_step", lambda *given: taken.append(1) or step(*given))
    return taken


@pytest.fixture
def untrained(monkeypatch):
    """The folders of the runs that train.py starts from now on, without actually training."""
    scores = {"evaluated_on": "test", "test/top1": 1.0, "test/top5": 1.0}
    begun = []
    monkeypatch.setattr(train, "train", lambda cfg, folder: begun.append(folder) or scores)
    return begun


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of images for `image_folders.load`."""
    return write_folder(tmp_path, monkeypatch)


@pytest.fixture
def server(tmp_path):
    """A fake wandb server in its own process."""
    server = ServerProcess(tmp_path / "server")
    yield server
    server.kill()


@pytest.fixture
def forked_runs(monkeypatch):
    """Fork the training runs that this process starts, for example by compare.py."""
    forking = SimpleNamespace(**(vars(subprocess) | {"Popen": app.fork}))
    monkeypatch.setattr(launch, "subprocess", forking)


@pytest.fixture
def sketches(request, monkeypatch):
    """Skip drawing a report's pictures, which is slow, unless a test uses ``pictures``."""
    from reporting import figures

    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "as_svg", lambda figure: "<svg/>")


@pytest.fixture
def pictures():
    """See `sketches`."""


def pytest_collection_modifyitems(items):
    """Run the longest tests first: started last, they would still run when all others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
