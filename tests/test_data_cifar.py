import hashlib
import http.server
import io
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from data import load_cifar
from data.cifar import SOURCES
from data.vision import datasets

from helpers import everything_below

SIZES = {"data_batch_1": 7, "data_batch_2": 6, "test_batch": 5}
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
NAMES = ["one", "two", "three"]
PROXIES = ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY")


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def file_contents() -> dict[str, bytes]:
    """Return the files of a tiny CIFAR-10 in the original layout: 32x32 planes, row by row."""
    random = np.random.default_rng(0)
    files = {"batches.meta": pickle.dumps({"label_names": NAMES})}
    for name, size in SIZES.items():
        rows = random.integers(0, 256, (size, 3 * 32 * 32), dtype=np.uint8)
        labels = random.integers(0, len(NAMES), size).tolist()
        files[name] = pickle.dumps({"data": rows, "labels": labels})
    return files


def archive_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def files(monkeypatch):
    """The tiny set's files, with their checksums patched into torchvision and no network."""
    contents = file_contents()
    sums = {name: md5(content) for name, content in contents.items()}
    kind = datasets.CIFAR10
    train = [[name, sums[name]] for name in SIZES if name != "test_batch"]
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr("data.cifar.TRAIN_SIZE", 13)
    # urllib caches the proxies from its first use.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.socket() as silent:
        # Bound without listening, it refuses connections, and no other process can take its port.
        silent.bind(("127.0.0.1", 0))
        for variable in PROXIES:
            monkeypatch.setenv(variable, f"http://127.0.0.1:{silent.getsockname()[1]}")
        yield contents


@pytest.fixture
def present(files, tmp_path):
    """A root that holds the tiny set."""
    (tmp_path / FOLDER).mkdir()
    for name, content in files.items():
        (tmp_path / FOLDER / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def server(files, monkeypatch):
    """A web server for the archive; ``state`` sets what it sends and counts the downloads."""
    state = {"content": archive_of(files), "cut_at": None, "gets": 0}
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(state["content"]))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(state["content"])))
            self.end_headers()

        def do_GET(self):
            # torchvision resolves redirects first, with a GET that it marks as HEAD.
            state["gets"] += self.headers["Method"] != "HEAD"
            self.do_HEAD()
            self.wfile.write(state["content"][: state["cut_at"]])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{httpd.server_port}/{ARCHIVE}")
    for variable in PROXIES:
        monkeypatch.delenv(variable)
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def raised(kind: type[Exception], *args, **kwargs) -> str:
    """Return the message that load_cifar fails with, after checking that it is one line."""
    with pytest.raises(kind) as caught:
        load_cifar(*args, **kwargs)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_reads_every_image_with_its_label(present, files):
    dataset = load_cifar("cifar10", str(present))
    for split, names in (
        (dataset.train, ["data_batch_1", "data_batch_2"]),
        (dataset.evaluation, ["test_batch"]),
    ):
        entries = [pickle.loads(files[name]) for name in names]
        rows = [row for entry in entries for row in entry["data"]]
        assert split.labels.tolist() == [label for entry in entries for label in entry["labels"]]
        assert split.pixels.shape == (len(rows), 32, 32, 3)
        assert split.pixels.is_contiguous()
        for n, channel, i, j in [(0, 0, 0, 1), (4, 1, 5, 0), (3, 2, 31, 30)]:
            assert split.pixels[n, i, j, channel] == rows[n][channel * 1024 + i * 32 + j]
    assert (dataset.name, dataset.evaluated_on) == ("cifar10", "test")
    assert (dataset.num_classes, dataset.class_names) == (3, tuple(NAMES))
    assert dataset.image_size == (32, 32)
    assert (dataset.mean, dataset.std) == (SOURCES["cifar10"].mean, SOURCES["cifar10"].std)


def test_holding_out_takes_the_evaluation_from_the_training_set(present):
    whole = load_cifar("cifar10", str(present)).train
    dataset = load_cifar("cifar10", str(present), val_size=4)
    assert dataset.evaluated_on == "val"
    assert (len(dataset.train), len(dataset.evaluation)) == (9, 4)
    split = [*dataset.train.pixels, *dataset.evaluation.pixels]
    assert sorted(p.flatten().tolist() for p in split) == sorted(
        p.flatten().tolist() for p in whole.pixels
    )


def test_a_tilde_means_the_home_folder(present, monkeypatch):
    monkeypatch.setenv("HOME", str(present.parent))
    assert len(load_cifar("cifar10", f"~/{present.name}").train) == 13


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"name": "cifar1000"}, "data.name=cifar1000 .*cifar10, cifar100"),
        ({"val_size": -1}, "val_size=-1 .*13"),
        ({"val_size": 13}, "val_size=13 .*13"),
    ],
)
def test_mistakes_are_reported_before_the_files_are_looked_at(files, tmp_path, options, word):
    message = raised(ValueError, **{"name": "cifar10", "root": str(tmp_path / "no"), **options})
    assert re.search(word, message)
    assert not (tmp_path / "no").exists()


def test_a_missing_set_without_network_leaves_nothing(files, tmp_path):
    root = tmp_path / "a" / "b"
    message = raised(FileNotFoundError, "cifar10", str(root))
    assert str(root / FOLDER) in message
    assert "the download failed (Connection refused)" in message
    assert "data.root=" in message
    assert everything_below(tmp_path) == {}


def test_a_silent_network_times_out(files, tmp_path, monkeypatch):
    monkeypatch.setattr("data.cifar._NETWORK_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", address)
        monkeypatch.setenv("HTTPS_PROXY", address)
        hang_guard = threading.Timer(60, silent.close)  # resets the connection
        hang_guard.start()
        message = raised(FileNotFoundError, "cifar10", str(tmp_path))
        hang_guard.cancel()
    assert "timed out" in message
    assert socket.getdefaulttimeout() is None


def test_download_can_be_forbidden(server, tmp_path):
    message = raised(FileNotFoundError, "cifar10", str(tmp_path), download=False)
    assert "data.download" in message
    assert str(tmp_path / FOLDER) in message
    assert server["gets"] == 0


# Python 3.12 and 3.13 warn that torchvision does not pass a tarfile filter.
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_downloads_once(server, tmp_path):
    root = str(tmp_path / "new")
    first = load_cifar("cifar10", root)
    assert (len(first.train), len(first.evaluation)) == (13, 5)
    second = load_cifar("cifar10", root)
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert server["gets"] == 1


@pytest.mark.parametrize("there_before", [True, False])
def test_download_that_breaks_off_leaves_what_was_there(server, tmp_path, there_before):
    server["cut_at"] = 100
    root = tmp_path / "root"
    if there_before:
        root.mkdir()
        (root / "mine").write_bytes(b"kept")
    message = raised(FileNotFoundError, "cifar10", str(root))
    assert "the download failed" in message
    assert server["gets"] > 0
    expected = {root: None, root / "mine": b"kept"} if there_before else {}
    assert everything_below(tmp_path) == expected


@pytest.fixture
def interrupted(monkeypatch):
    """A function that loads the set into a root and is interrupted during the download.

    ``meanwhile`` is called in the middle of that download.
    """

    def load(root, meanwhile=lambda: None):
        def download(self):
            Path(self.root, ARCHIVE).write_bytes(b"half")
            Path(self.root, FOLDER).mkdir()
            Path(self.root, FOLDER, "data_batch_1").write_bytes(b"half")
            meanwhile()
            raise KeyboardInterrupt

        monkeypatch.setattr(datasets.CIFAR10, "download", download)
        with pytest.raises(KeyboardInterrupt):
            load_cifar("cifar10", str(root))

    return load


@pytest.mark.parametrize("theirs", [FOLDER + "/data_batch_1", ARCHIVE, "notes.txt"])
def test_download_that_is_interrupted_leaves_the_files_of_others(
    files, tmp_path, interrupted, theirs
):
    root = tmp_path / "new" / "root"

    def meanwhile():
        (root / theirs).parent.mkdir(parents=True, exist_ok=True)
        (root / theirs).write_bytes(b"theirs")

    interrupted(root, meanwhile)
    left = everything_below(root)
    assert left.pop(root / theirs) == b"theirs"
    assert left in ({}, {root / FOLDER: None})


@pytest.mark.parametrize("root", ["new/root", "empty", "empty/new", "empty/new/root"])
def test_download_that_is_interrupted_leaves_nothing_but_what_was_there(
    files, tmp_path, interrupted, root
):
    (tmp_path / "empty").mkdir()
    interrupted(tmp_path / root)
    assert everything_below(tmp_path) == {tmp_path / "empty": None}


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_two_downloads_at_once_both_end_well(server, tmp_path, monkeypatch):
    plain = datasets.CIFAR10.download

    def download(self):
        monkeypatch.setattr(datasets.CIFAR10, "download", plain)
        other = load_cifar("cifar10", str(tmp_path))
        assert len(other.train) == 13
        plain(self)

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    assert len(load_cifar("cifar10", str(tmp_path)).train) == 13
    assert server["gets"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, ARCHIVE}


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize("download", [True, False])
def test_damaged_files_are_named_and_left_alone(present, name, damage, download):
    path = present / FOLDER / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    before = everything_below(present)
    message = raised(ValueError, "cifar10", str(present), download=download)
    assert f"{present / FOLDER} has missing or damaged files ({name})" in message
    assert everything_below(present) == before


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_damaged_files_are_downloaded_again_and_the_others_left(server, present, files, name):
    (present / FOLDER / "mine").write_bytes(b"kept")
    intact = {n: (present / FOLDER / n).stat().st_ino for n in files if n != name}
    (present / FOLDER / name).write_bytes(b"damaged")
    assert len(load_cifar("cifar10", str(present)).train) == 13
    assert server["gets"] == 1
    assert (present / FOLDER / name).read_bytes() == files[name]
    assert (present / FOLDER / "mine").read_bytes() == b"kept"
    assert {n: (present / FOLDER / n).stat().st_ino for n in intact} == intact


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
@pytest.mark.parametrize("intact", [True, False])
def test_an_archive_that_is_there_is_used_if_intact(server, tmp_path, intact):
    (tmp_path / ARCHIVE).write_bytes(server["content"][: None if intact else 100])
    assert len(load_cifar("cifar10", str(tmp_path)).train) == 13
    assert server["gets"] == (0 if intact else 1)
    assert (tmp_path / ARCHIVE).read_bytes() == server["content"]
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, ARCHIVE}


@pytest.mark.thorough
def test_modules_that_windows_lacks_are_not_needed():
    script = (
        "import sys, data.vision\n"  # torch and torchvision themselves may need these modules
        "for name in [n for n in sys.modules if n.split('.')[0] == 'data']:\n"
        "    del sys.modules[name]\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'posix'):\n"
        "    sys.modules[name] = None\n"
        "import data.cifar, data.lookup, data.vision\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_a_root_that_cannot_be_written_is_named(files, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    root = tmp_path / "file" / "below"
    message = raised(FileNotFoundError, "cifar10", str(root))
    assert f"data.root={root} cannot be written" in message
    assert everything_below(tmp_path) == {tmp_path / "file": b""}


def test_a_root_without_permission_is_named(present, monkeypatch):
    def denied(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    # Not by chmod, because root may read everything.
    monkeypatch.setattr(datasets.CIFAR10, "__init__", denied)
    assert f"data.root={present} cannot be read" in raised(ValueError, "cifar10", str(present))


def test_the_coarse_classes_are_the_coarse_labels_of_the_same_images(monkeypatch, tmp_path):
    random = np.random.default_rng(1)
    kind = datasets.CIFAR100
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    expected, sums = {}, {}
    for name, size in (("train", 13), ("test", 5)):
        fine = random.integers(0, 4, size).tolist()
        expected[name] = [[2, 0, 1, 2][label] for label in fine]
        rows = random.integers(0, 256, (size, 3 * 32 * 32), dtype=np.uint8)
        content = {"data": rows, "fine_labels": fine, "coarse_labels": expected[name]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((folder / name).read_bytes())
    names = {"fine_label_names": ["cod", "ivy", "fox", "eel"], "coarse_label_names": NAMES}
    (folder / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(kind, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5((folder / "meta").read_bytes())})
    monkeypatch.setattr("data.cifar.TRAIN_SIZE", 13)
    coarse = load_cifar("cifar100_coarse", str(tmp_path), download=False)
    fine = load_cifar("cifar100", str(tmp_path), download=False)
    assert coarse.train.labels.tolist() == expected["train"]
    assert coarse.evaluation.labels.tolist() == expected["test"]
    assert (coarse.num_classes, coarse.class_names) == (3, tuple(NAMES))
    assert torch.equal(coarse.train.pixels, fine.train.pixels)
    assert (coarse.mean, coarse.std) == (fine.mean, fine.std)
    held_out = load_cifar("cifar100_coarse", str(tmp_path), val_size=4, download=False)
    kept = torch.cat([held_out.train.labels, held_out.evaluation.labels])
    assert sorted(kept.tolist()) == sorted(expected["train"])


@pytest.mark.real_data
@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT is not set")
def test_the_real_cifar100_has_twenty_coarse_classes_of_five_fine_ones():
    root = os.environ["CIFAR_ROOT"]
    fine, coarse = (
        load_cifar(name, root, download=False) for name in ("cifar100", "cifar100_coarse")
    )
    pairs = set(zip(fine.train.labels.tolist(), coarse.train.labels.tolist(), strict=True))
    assert len(pairs) == 100
    assert torch.bincount(torch.tensor([c for _, c in pairs])).tolist() == [5] * 20
    named = {fine.class_names[f]: coarse.class_names[c] for f, c in pairs}
    assert (named["shark"], named["maple_tree"]) == ("fish", "trees")
    tested = zip(fine.evaluation.labels.tolist(), coarse.evaluation.labels.tolist(), strict=True)
    assert set(tested) == pairs


@pytest.mark.real_data
@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT is not set")
def test_the_real_cifar100_is_read_whole_and_has_the_stated_mean_and_deviation():
    dataset = load_cifar("cifar100", os.environ["CIFAR_ROOT"], download=False)
    assert (len(dataset.train), len(dataset.evaluation), dataset.num_classes) == (50000, 10000, 100)
    assert torch.bincount(dataset.train.labels).tolist() == [500] * 100
    assert torch.bincount(dataset.evaluation.labels).tolist() == [100] * 100
    assert dataset.class_names[:2] == ("apple", "aquarium_fish")
    for channel in range(3):
        counts = np.bincount(dataset.train.pixels[..., channel].numpy().ravel())
        levels = np.arange(256) / 255
        mean = np.average(levels, weights=counts)
        deviation = np.average((levels - mean) ** 2, weights=counts) ** 0.5
        # The constants have four decimal places.
        assert dataset.mean[channel] == pytest.approx(mean, abs=5.1e-5)
        assert dataset.std[channel] == pytest.approx(deviation, abs=5.1e-5)


def test_the_digest_is_of_the_files_that_were_checked(present, monkeypatch):
    digest = load_cifar("cifar10", str(present)).digest
    assert load_cifar("cifar10", str(present)).digest == digest
    held_out = {load_cifar("cifar10", str(present), val_size=n).digest for n in (1, 2)}
    assert len({digest, *held_out}) == 3
    other = pickle.dumps({"data": np.zeros((5, 3072), np.uint8), "labels": [0] * 5})
    (present / FOLDER / "test_batch").write_bytes(other)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(other)]])
    assert load_cifar("cifar10", str(present)).digest != digest
