"""The folder of a run: file names, locking, writing, and reading with checks.

    metrics.csv      a row for each epoch
    summary.json     the last epoch's scores and where they come from; only of a finished run
    weights.safetensors, config.json    the finished network, see `models.load`
    best.safetensors the network after the best epoch on held-out images (keep_best)
    failed.json      the error of a run that diverged: a loss or a score was not finite
    no_run.json      the only file: why a sweep's job was refused, or failed with nothing to keep
    last.pt          the newest checkpoint; previous.pt is the one before
    train.log        the log of the run
    .hydra/          the settings, as written by Hydra
    .lock, .holder   only while a process uses the folder: its lock, and which process it is; plus
                     .lock-soft if the file system has no locks

A process claims the folder before it writes anything there and holds the claim until it ends; other
processes are refused. If the process ends before there is anything to keep, the files that it
created, and only those, are removed.

Every reader checks the format's version and the keys it promises, so an error message names the
damaged file and key in one line, and callers can rely on the data.
"""

import csv
import datetime
import errno
import io
import json
import logging
import logging.handlers
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import filelock
import yaml  # type: ignore[import-untyped]
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from aaconv.text import one_line
from models.fields import FORMAT, UnreadableError, parse, read_json, read_text
from models.saved import (
    DESCRIPTION,
    WEIGHTS,
    Description,
    description_as_text,
    tensors_as_bytes,
)
from training import console
from training.files import csv_text, make_folder, write_files, write_json, write_text, write_texts
from training.records import Failure, NoRun, Summary, check_summary, row_type

METRICS = "metrics.csv"
SUMMARY = "summary.json"
FAILURE = "failed.json"
NO_RUN = "no_run.json"
LAST = "last.pt"
PREVIOUS = "previous.pt"
LOG = "train.log"
BEST = "best.safetensors"
HYDRA = ".hydra"
LOCK = ".lock"
SOFT_LOCK = ".lock-soft"
HOLDER = ".holder"

Record = TypeVar("Record")

# Error codes of file systems without locks. 524 is Linux's ENOTSUPP, which NFS passes on.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, 524)


class HeldError(ValueError):
    """Another process uses the folder; the message is one line that says which."""


class DivergedError(ValueError):
    """The folder's run has diverged; the message is one line that says how to train it again."""


# ---- Claiming and writing -----------------------------------------------------------------------


class RunFolder:
    """A run's folder that this process has claimed; see `claimed`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []  # in order of creation
        self._kept = False
        self._claim: filelock.BaseFileLock | None = None
        self._data_digest: str | None = None
        self._log: _LogFile | None = None
        # Collects what is logged before the run may write to its folder.
        self._early = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)

    def start(
        self, cfg: DictConfig, replaced: Iterable[Path] = (), data_digest: str | None = None
    ) -> None:
        """Start writing: remove the ``replaced`` files, save the settings and open the log.

        Call this once all settings are known to be valid. The replaced files are removed in the
        given order: a kill in between leaves a folder that can be continued or replaced.
        ``data_digest`` is the digest of the run's images, for failed.json.

        Raises:
            OSError: if the folder is not writable.
            ValueError: if train.log is a named pipe.
        """
        self._data_digest = data_digest
        for path in (*replaced, self.path / FAILURE, self.path / NO_RUN):
            path.unlink(missing_ok=True)
        make_folder(self.path / HYDRA, self._made)
        settings = {"config.yaml": OmegaConf.to_yaml(cfg)}
        if HydraConfig.initialized():
            hydra = HydraConfig.get()
            settings["hydra.yaml"] = OmegaConf.to_yaml({"hydra": hydra})
            settings["overrides.yaml"] = OmegaConf.to_yaml(hydra.overrides.task)
        texts = {self.path / HYDRA / name: text for name, text in settings.items()}
        self._made += [path for path in (*texts, self.path / LOG) if not path.exists()]
        write_texts(texts)
        if (self.path / LOG).is_fifo():  # opening it would block until something reads it
            raise ValueError(f"{self.path / LOG} is not a regular file; delete it")
        self._log = _LogFile(self.path / LOG)
        self._early.setTarget(self._log)
        self._early.flush()
        logging.getLogger().addHandler(self._log)
        logging.getLogger().removeHandler(self._early)

    def keep(self) -> None:
        """From now on, keep the files however the process ends."""
        self._kept = True

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.csv, a row for each epoch; without rows, delete it."""
        for row in rows:
            parse(row_type(tuple(row)), row, f"{self.path / METRICS}")
        if rows:
            head = list(rows[0])  # rows of a resumed run may order their columns differently
            table = [head, *([row[name] for name in head] for row in rows)]
            write_text(self.path / METRICS, csv_text(table))
        else:
            (self.path / METRICS).unlink(missing_ok=True)

    def write_weights(
        self, model: nn.Module, description: Description, name: str = WEIGHTS
    ) -> None:
        """Write the weights to the file ``name``, and config.json, for `models.load`."""
        weights = tensors_as_bytes(model.state_dict())
        write_text(self.path / DESCRIPTION, description_as_text(description))
        write_files({self.path / name: weights})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which marks the run as finished."""
        check_summary(summary, f"{self.path / SUMMARY}")
        write_json(self.path / SUMMARY, summary)

    def write_failure(self, error: FloatingPointError) -> None:
        """Write failed.json: why the run has no result."""
        failure = Failure(format=FORMAT, error=str(error))
        if self._data_digest is not None:
            failure["data_digest"] = self._data_digest
        write_json(self.path / FAILURE, failure)
        self.keep()

    def _acquire(self) -> None:
        while True:
            make_folder(self.path, self._made)
            try:
                # Wait for a second, because `holder` also takes the lock for a moment.
                lock = _lock(self.path, timeout=1)
            except filelock.Timeout as error:
                raise HeldError(
                    f"{self.path} is in use by {_holder_of(self.path, error.lock_file)}; wait for "
                    "it, stop it, or give another name=, out_dir= or run_dir="
                ) from None
            except OSError:
                if self.path in self._made:
                    (self.path / LOCK).unlink(missing_ok=True)
                raise
            # The previous holder may have removed the lock file between opening and locking it.
            if Path(lock.lock_file).exists():
                break
            lock.release(force=True)
        self._claim = lock
        write_text(self.path / HOLDER, json.dumps(_this_process()))

    def _close(self) -> None:
        """Remove the files this process created unless they are to be kept, then end the claim."""
        root = logging.getLogger()
        root.removeHandler(self._early)
        if self._log is not None:
            root.removeHandler(self._log)
            self._log.close()
        made = [] if self._kept else self._made[::-1]
        for path in made:
            if not path.is_dir():
                with suppress(OSError):
                    path.unlink()
        if self._claim is not None:
            for name in (HOLDER, LOCK):
                with suppress(OSError):  # Windows does not delete open files
                    (self.path / name).unlink()
            with suppress(OSError):  # the file system may have lost its locks meanwhile
                self._claim.release(force=True)
        for path in made:
            if path.is_dir():
                with suppress(OSError):  # others may have put something there meanwhile
                    path.rmdir()


def write_no_run(folder: Path, kind: str, why: str, config: dict[str, Any]) -> None:
    """Write no_run.json: why a sweep's job with the settings ``config`` has no run in ``folder``.

    Do nothing if the folder holds a run.

    Raises:
        OSError: if the file cannot be written.
    """
    if folder.is_dir() and is_run(path.name for path in folder.iterdir()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NO_RUN, {"format": FORMAT, "outcome": kind, "why": why, "config": config})


@contextmanager
def claimed(path: Path) -> Iterator[RunFolder]:
    """Claim the folder ``path`` until the ``with`` ends; create it if it is missing.

    If the run ends before `RunFolder.keep`, everything that it created is removed.

    Raises:
        HeldError: if another process holds the folder.
        OSError: if the folder cannot be created or is not writable.
    """
    folder = RunFolder(path)
    try:
        folder._acquire()
        logging.getLogger().addHandler(folder._early)
        yield folder
    except FloatingPointError as error:
        folder.write_failure(error)
        raise
    finally:
        folder._close()


def holder(path: Path) -> str | None:
    """Describe the process that holds the folder; None if none does."""
    if not (path / LOCK).exists():
        return None
    try:
        _lock(path, timeout=0).release()
    except filelock.Timeout as error:
        return _holder_of(path, error.lock_file)
    return None


def _holder_of(path: Path, lock_file: str) -> str:
    """Describe the process that holds the lock of the folder ``path``."""
    try:
        process = json.loads((path / HOLDER).read_text(encoding="utf-8"))
        name = f"process {process['pid']} on {process['host']}, started {process['started']}"
        facts = [f"{process['command']}"]
        here = process["host"] == platform.node()
    except (OSError, ValueError, TypeError, KeyError):  # the process has not written it yet
        name, facts, here = "another process", [], False
    # Whether a process on another machine is still alive cannot be checked here.
    facts += [] if here else [f"if it has died, delete {lock_file}"]
    return f"{name} ({'; '.join(facts)})"


def _lock(path: Path, timeout: float) -> filelock.BaseFileLock:
    """Acquire and return the folder's lock; a lock file if the file system has no locks.

    Raises:
        filelock.Timeout: if another process holds it.
        OSError: if the lock's file cannot be written.
    """
    lock: filelock.BaseFileLock = filelock.FileLock(path / LOCK, timeout=timeout)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lock = filelock.SoftFileLock(path / SOFT_LOCK, timeout=timeout)
        lock.acquire()
    return lock


def _this_process() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": command if len(command) <= 200 else f"{command[:197]}...",
    }


class _LogFile(logging.FileHandler):
    """A log file that reports a write error once, in one line, and is silent after that."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="surrogateescape")
        self.setFormatter(logging.Formatter("[%(asctime)s][%(levelname)s] %(message)s"))
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self._failed = True
        error = sys.exc_info()[1]
        assert error is not None
        console.write_stderr(
            f"{self.baseFilename} cannot be written ({one_line(error)}); training "
            "continues without it\n"
        )

    def close(self) -> None:
        with suppress(OSError):  # the rest of the buffer may not fit on the disk
            super().close()


# ---- Reading ------------------------------------------------------------------------------------


def is_run(names: Iterable[str]) -> bool:
    """Whether a folder with these file names holds a run."""
    return not {METRICS, SUMMARY, LAST, PREVIOUS, FAILURE}.isdisjoint(names)


def read_summary(folder: Path) -> Summary:
    """Read and check summary.json; losses and scores may be NaN or infinite.

    Raises:
        FileNotFoundError: if the file is missing.
        UnreadableError: if the file is damaged or of another format.
    """
    path = folder / SUMMARY
    return check_summary(_with_format(read_json(path)), f"{path}")


def read_result(folder: Path) -> tuple[Summary, list[dict[str, float]]]:
    """Read summary.json and metrics.csv of a finished run, checked against each other.

    Raises:
        FileNotFoundError: if there is no summary.json: the run is not finished.
        UnreadableError: if either file is damaged or of another format, or they disagree.
    """
    summary = read_summary(folder)
    path = folder / METRICS
    try:
        rows = read_metrics(folder)
    except FileNotFoundError:
        raise UnreadableError(f"{path} is missing, but there is a {SUMMARY}") from None
    if len(rows) != summary["epochs"]:
        raise UnreadableError(
            f"{path} has {len(rows)} epochs, but {SUMMARY} says epochs is {summary['epochs']}"
        )
    if f"{summary['evaluated_on']}/top1" not in rows[0]:
        raise UnreadableError(
            f"{path} has no column {summary['evaluated_on']}/top1, but {SUMMARY} says "
            f"evaluated_on is {summary['evaluated_on']}"
        )
    return summary, rows


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.csv, one for each epoch from 1 on, with all values as numbers.

    Losses and scores may be NaN or infinite.

    Raises:
        FileNotFoundError: if the file is missing.
        UnreadableError: if the file is damaged or of another format.
    """
    path = folder / METRICS
    content = read_text(path)
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""))
        header, texts = list(reader.fieldnames or []), list(reader)
    except csv.Error as error:
        raise UnreadableError(f"{path} is damaged: {one_line(error)}") from None
    if not header:
        raise UnreadableError(f"{path} is empty")
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise UnreadableError(f"{path} has more than one column {twice}")
    if not content.endswith("\n"):
        raise UnreadableError(f"{path}, row {len(texts)}: the line is cut short")
    kind = row_type(tuple(header))
    missing = next((column for column in kind.__annotations__ if column not in header), None)
    if missing is not None:
        raise UnreadableError(f"{path} has no column {missing}: it is damaged or of another format")
    return [_row(text, kind, number, path) for number, text in enumerate(texts, start=1)]


def _row(text: dict[Any, Any], kind: Any, number: int, path: Path) -> dict[str, float]:
    where = f"{path}, row {number}"
    if None in text:
        raise UnreadableError(f"{where} has more values than there are columns")
    row: dict[str, float] = parse(kind, {k: _as_number(v) for k, v in text.items()}, where)
    if row["epoch"] != number:
        raise UnreadableError(f"{where}: epoch is {text['epoch']}, not {number}")
    return row


def _as_number(text: str | None) -> Any:
    """Convert ``text`` to a number; leave other text unchanged, for the error message."""
    try:
        return float(text or "")
    except ValueError:
        return text


def read_failure(folder: Path) -> Failure | None:
    """Read failed.json, which says that the run has diverged; None if the file is missing.

    Raises:
        UnreadableError: if the file is damaged or of another format.
    """
    return _read_record(folder / FAILURE, Failure)


def read_no_run(folder: Path) -> NoRun | None:
    """Read no_run.json, which says why a sweep's job has no run; None if the file is missing.

    Raises:
        UnreadableError: if the file is damaged or of another format.
    """
    return _read_record(folder / NO_RUN, NoRun)


def _read_record(path: Path, kind: type[Record]) -> Record | None:
    try:
        return parse(kind, _with_format(read_json(path)), f"{path}")
    except FileNotFoundError:
        return None


def _with_format(value: Any) -> Any:
    """Add the format to the value of a JSON file of format 1, which does not state it."""
    return {"format": 1, **value} if isinstance(value, dict) else value


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return all settings that the run was started with; None if they cannot be read."""
    try:
        text = read_text(folder / HYDRA / "config.yaml")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return None  # Hydra writes no aliases, and a few lines of them can expand to any size
        cfg = OmegaConf.create(text)
        found = OmegaConf.to_container(cfg, resolve=True)
    except Exception:  # YAML and OmegaConf may raise anything on damaged files
        return None
    return found if isinstance(found, dict) else None  # type: ignore[return-value]


def scores_line(summary: Mapping[str, Any]) -> str:
    """Return a finished run's scores as text."""
    on = summary["evaluated_on"]
    return f"{on} top-1 {summary[f'{on}/top1']:.2f}, top-5 {summary[f'{on}/top5']:.2f}"


def top1(summary: Mapping[str, Any]) -> float:
    """Return a finished run's top-1 accuracy in percent."""
    return float(summary[f"{summary['evaluated_on']}/top1"])
