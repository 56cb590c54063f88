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

# Without a GPU, Triton's kernels run in its interpreter. It must be asked for before anything
# imports triton, as torch's count of operations does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import train
from training import launch
from training.compose import compose_config

import app
from helpers import TINY
from image_folders import write_folder
from wandb_server import ServerProcess

# A shell that starts the tests in the background lets them ignore Ctrl-C, and with them all the
# processes that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Networks this small run no faster on two threads, and the suite runs in two processes.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def server_of_commands():
    """What `app.App` has started lives no longer than the tests."""
    yield
    app.stop_server()


@pytest.fixture(autouse=True)
def hang_guard():
    """A test that waits forever, as one that opens a named pipe does, fails after half an hour."""

    def hang(*_):
        pytest.fail("still waiting after half an hour")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(1800)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def own_wandb_process(monkeypatch):
    """Processes that a test starts do not share a wandb process that an earlier test has left."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


@pytest.fixture(autouse=True)
def own_log_handlers():
    """A command that a test calls as a function logs to streams that are closed afterwards."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


@cache
def composed(words):
    """The settings of these words, which many tests share; to compose them takes a while."""
    return compose_config(words)


@pytest.fixture
def settings(tmp_path):
    """A function from overrides to the settings of a tiny run below ``tmp_path``."""

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
    """A list that has an item for each step of training from here on."""
    taken, step = [], train.take_step
    monkeypatch.setattr(train, "take_step", lambda *given: taken.append(1) or step(*given))
    return taken


@pytest.fixture
def untrained(monkeypatch):
    """The folders of the runs that train.py begins from here on, which are not trained."""
    scores = {"evaluated_on": "test", "test/top1": 1.0, "test/top5": 1.0}
    begun = []
    monkeypatch.setattr(train, "train", lambda cfg, folder: begun.append(folder) or scores)
    return begun


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of images as `image_folders.load` reads it."""
    return write_folder(tmp_path, monkeypatch)


@pytest.fixture
def server(tmp_path):
    """A stand-in for wandb's server."""
    server = ServerProcess(tmp_path / "server")
    yield server
    server.kill()


@pytest.fixture
def forked_runs(monkeypatch):
    """The runs that this process starts, as compare.py does, are forked."""
    forking = SimpleNamespace(**(vars(subprocess) | {"Popen": app.fork}))
    monkeypatch.setattr(launch, "subprocess", forking)


@pytest.fixture
def sketches(request, monkeypatch):
    """A report's pictures are drawn only where a test asks for ``pictures``: they take longest."""
    from reporting import figures

    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "as_svg", lambda figure: "<svg/>")


@pytest.fixture
def pictures():
    """See `sketches`."""


def pytest_collection_modifyitems(items):
    """The longest first: begun last, they would run on when all others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
