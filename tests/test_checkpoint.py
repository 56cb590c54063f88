"""Files and checkpoints that survive kills, full disks and damage."""

import logging
import os
import resource
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_saved import describe
from torch import nn

from training import checkpoint, files
from training.files import write_files
from training.progress import Progress

CONFIG = {"seed": 1, "wandb": {"mode": "offline"}, "data": {"root": "a", "val_size": 0}}


def model(size=20):
    """Return a model that has a tensor of bytes 7, which can be found in its file."""
    made = nn.Linear(size, size)
    made.register_buffer("sevens", torch.full((1000,), 7, dtype=torch.uint8))
    return made


def save(folder, number, size=20):
    """Save a checkpoint after this number of steps."""
    parts = {"model": model(size)}
    state = SimpleNamespace(stateful=lambda: parts, description=describe())
    progress = Progress.begin(9)
    progress.epoch_state = replace(progress.epoch_state, step=number)
    checkpoint.save(folder, state, CONFIG, progress)


def read(folder, config=CONFIG):
    """Return the file name and the step of the checkpoint that is used."""
    path, state = checkpoint.load(checkpoint.find("auto", folder), config)
    return path.name, state["epoch_state"]["step"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def half(file):
        file.write(b"hal")
        raise OSError("no space left")

    with pytest.raises(OSError, match=r"file cannot be written \(no space left\)"):
        write_files({path: half})
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    write_files({path: b"after"})
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_in_the_place_of_a_half_written_file_is_not_written_to(tmp_path):
    """It may be a link to another file, a pipe, a leftover of a kill, or a folder."""
    path, partial, other = (tmp_path / name for name in ("file", "file.partial", "other"))
    other.write_text("mine")
    for there in (
        lambda: partial.symlink_to(other),
        lambda: os.mkfifo(partial),
        lambda: partial.write_bytes(b"half"),
    ):
        there()
        write_files({path: b"whole"})
        assert path.read_bytes() == b"whole"
        assert other.read_text() == "mine"
        assert not partial.exists()
    partial.mkdir()
    with pytest.raises(OSError, match=r"file cannot be written \(Is a directory\)"):
        write_files({path: b"new"})
    assert path.read_bytes() == b"whole"


def test_the_last_two_are_kept(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, number)
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    assert read(tmp_path) == ("last.pt", 3)
    (tmp_path / "last.pt").unlink()
    assert read(tmp_path) == ("previous.pt", 2)


def test_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """The order is safe against a power failure: content, then two renames, then folder."""
    done = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle):
        done.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def record_replace(a, b):
        done.append((a.name, b.name))
        replace(a, b)

    save(tmp_path, 1)
    monkeypatch.setattr(files.os, "fsync", record_fsync)
    monkeypatch.setattr(files.os, "replace", record_replace)
    save(tmp_path, 2)
    assert done == [
        ("fsync", "last.pt.partial"),
        ("last.pt", "previous.pt"),
        ("last.pt.partial", "last.pt"),
        ("fsync", tmp_path.name),
    ]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("saved_before", [0, 1, 2])
def test_a_kill_at_any_moment_of_saving_leaves_a_good_checkpoint(tmp_path, saved_before):
    """The process ends at the n-th write, fsync or move, without a chance to clean up."""
    moments, n = 0, 0
    while moments == n:
        n += 1
        folder = tmp_path / str(n)
        folder.mkdir()
        for number in range(saved_before):
            save(folder, number)
        child = os.fork()
        if child == 0:
            try:
                _end_at_moment(n)
                save(folder, saved_before)
            finally:
                os._exit(0)
        moments += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found = checkpoint.find("auto", folder)
        if found:
            _, number = read(folder)
            assert number in (saved_before - 1, saved_before), n
        else:
            assert saved_before == 0, n
        save(folder, 77)  # leftovers of a kill do not get in the way
        assert read(folder) == ("last.pt", 77)
        assert {p.name for p in folder.iterdir()} <= {"last.pt", "previous.pt"}
    assert moments >= 4


def _end_at_moment(n):
    left = [n]

    def ending(act):
        def then(*arguments):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return act(*arguments)

        return then

    torch.save = ending(torch.save)
    os.fsync, os.replace = ending(os.fsync), ending(os.replace)


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path):
    path.write_bytes(b"")


def damage_one_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"\x07" * 64) + 10] ^= 1  # inside a tensor
    path.write_bytes(content)


def damage_code(path):
    torch.save(nn.Linear(2, 2), path)


@pytest.mark.parametrize("damage", [damage_truncated, damage_empty, damage_one_bit, damage_code])
def test_a_damaged_one_is_reported_and_the_one_before_is_used(tmp_path, caplog, damage):
    for number in (1, 2):
        save(tmp_path, number)
    damage(tmp_path / "last.pt")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == ("previous.pt", 1)
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith(f"{tmp_path / 'last.pt'} is damaged (")
    assert message.endswith(f"continuing from {tmp_path / 'previous.pt'}")
    assert "\n" not in message
    damage(tmp_path / "previous.pt")
    with pytest.raises(ValueError, match=r"no readable checkpoint .*overwrite=true"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        checkpoint.load([tmp_path / "last.pt"], CONFIG)


def test_settings_that_change_no_result_may_differ(tmp_path):
    save(tmp_path, 3)
    other = {"seed": 1, "wandb": {"mode": "auto"}, "data": {"root": "b", "val_size": 0}}
    assert read(tmp_path, other | {"max_minutes": 9}) == ("last.pt", 3)
    with pytest.raises(ValueError, match=r"val_size \(0 in the checkpoint, 5 now\), seed \(1 in"):
        read(tmp_path, {"seed": 2, "data": {"root": "a", "val_size": 5}})


def test_a_state_that_other_code_has_not_written(tmp_path):
    save(tmp_path, 1)
    path, state = checkpoint.load(checkpoint.find("auto", tmp_path), CONFIG)
    words = r"last\.pt was written by a different version of this code: .ema_model is missing"
    with pytest.raises(ValueError, match=words):
        checkpoint.restore(state, {"ema_model": nn.Linear(2, 3)}, path)


def refusal(folder, damage):
    """Return the one-line error for a checkpoint whose content ``damage`` has changed."""
    save(folder, 1)
    path = folder / "last.pt"
    state = torch.load(path, weights_only=True)
    damage(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"last\.pt was written by a different version of") as told:
        checkpoint.restore(checkpoint.load([path], CONFIG)[1], {"model": model()}, path)
    assert "\n" not in str(told.value)
    return str(told.value)


KEYS = ["format", "config", "model", "epoch_state", "rows", "per_class_top1", "segments"]
KEYS += ["epoch_state.step", "epoch_state.totals", "epoch_state.lr"]
KEYS += ["description", "description.mean", "description.class_names", "description.network"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["gone", -7.5, "a word", (3,), True], ids=str)
def test_a_checkpoint_without_a_key_or_with_another_type(tmp_path, key, value):
    group, _, name = key.rpartition(".")

    def damage(state):
        inside = state[group] if group else state
        inside[name] = value
        if value == "gone":
            del inside[name]

    assert name in refusal(tmp_path, damage) or key in ("model", "config")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("totals", {"loss": torch.zeros(3)}, "totals.loss has the shape (3,), not (2,)"),
        ("totals", {"loss": torch.zeros(2, dtype=torch.int64)}, "totals.loss is torch.int64, not"),
        ("totals", {"loss": [0.0, 1.0]}, "totals.loss is [0.0, 1.0]; input should be an instance"),
        ("first_nonfinite_step", torch.zeros(2), "first_nonfinite_step is torch.float32 of shape"),
        ("seconds", float("nan"), "seconds is NaN"),
        ("rows", [{"epoch": 1}], "rows of epoch 1: "),
        ("rows", [None], "rows[0] is null"),
    ],
)
def test_a_damaged_field_of_the_progress_is_named(tmp_path, key, value, words):
    def damage(state):
        (state if key in state else state["epoch_state"])[key] = value

    assert words in refusal(tmp_path, damage)


def set_(state, value, *keys):
    for key in keys[:-1]:
        state = state[key]
    state[keys[-1]] = value


@pytest.mark.parametrize(
    ("value", "keys", "words"),
    [
        (
            torch.zeros(2, 2),
            ("model", "weight"),
            "weight has shape (2, 2); this run's network has (3, 2)",
        ),
        (torch.zeros(3, dtype=torch.int64), ("model", "bias"), "bias is torch.int64; this run's"),
        (None, ("model", "bias"), "model: bias is null, not a tensor"),
        (None, ("model",), "model is null, not tensors by their names"),
        (torch.zeros(5), ("optimizer", "state", 0, "exp_avg"), "optimizer: exp_avg is (5,) of "),
        ([1], ("optimizer", "state", 1, "exp_avg_sq"), "optimizer: exp_avg_sq is "),
        (None, ("optimizer",), "written by a different version"),
        (None, ("schedule",), "written by a different version"),
    ],
)
def test_damaged_states_are_one_line(tmp_path, value, keys, words):
    def parts():
        network = nn.Linear(2, 3)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        return {"model": network, "optimizer": optimizer, "schedule": schedule}

    trained = parts()
    trained["model"](torch.randn(4, 2)).sum().backward()
    trained["optimizer"].step()
    state = deepcopy({name: part.state_dict() for name, part in trained.items()})
    checkpoint.restore(deepcopy(state), parts(), tmp_path)  # works before the change
    set_(state, value, *keys)
    with pytest.raises(ValueError, match="written by a different version of") as told:
        checkpoint.restore(state, parts(), tmp_path)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.fixture
def full_disk():
    """A function that limits the size of files that this process can write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 70_000])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, full_disk, size):
    save(tmp_path, 1)
    full_disk(size)
    with pytest.raises(OSError, match=r"last\.pt cannot be written \(File too large\)"):
        save(tmp_path, 2, size=400)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert read(tmp_path) == ("last.pt", 1)
