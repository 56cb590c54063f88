"""Run the jobs of ``train.py -m`` and collect their outcomes, for any sweeper and launcher.

A job returns its score, or `NO_SCORE`, instead of raising an error, so a failed job does not end
the sweep, be it Hydra's basic sweeper or a search. A launcher may run jobs in other processes, so
each job writes a record to a folder created before the first job; the table at the end is made
from these records.
"""

import json
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from training import console
from training.errors import explain, is_for_the_user
from training.files import write_json
from training.tracking import WANDB_RUN_VARS, under_agent
from training.world import world

if TYPE_CHECKING:
    from filelock import BaseFileLock

# The score of a job without a result, for a sweeper that searches: the lowest top-1 accuracy.
NO_SCORE = 0.0
# Environment variable with the folder of the sweep's records, for a launcher's processes.
RECORDS = "AACONV_SWEEP"
# Environment variable with the names of the settings that are the same in all jobs.
FIXED = "AACONV_SWEEP_FIXED"
PREFIX, LOCK = ".sweep-", "lock"
# The file in which Hydra describes a sweep.
DESCRIPTION = "multirun.yaml"


@dataclass
class Record:
    """The record of a job: its number, label, run folder, outcome and the reason for it.

    ``label`` has the overrides that are not common to all jobs. ``outcome`` is one of
    `training.outcome.ALL`, or empty while the job is running. ``config`` has the settings of a job
    without a result.
    """

    number: int
    label: str = ""
    folder: str = ""
    outcome: str = ""
    why: str = ""
    config: dict[str, Any] | None = None

    def write(self, kind: str, why: str) -> None:
        """Set the job's outcome and write the record for the sweep's other processes."""
        self.outcome, self.why = kind, why
        if world().is_main and RECORDS in os.environ:
            write_json(Path(os.environ[RECORDS]) / f"{self.number}.json", asdict(self))


class Sweep(NamedTuple):
    """A sweep started by this process, the main process, which also owns its records.

    Attributes:
        jobs: the number of jobs, if known.
        records: the folder of the records, in that of the sweep; ``lock`` is its lock.
        before: the previous content of the sweep's `DESCRIPTION` file, if there was one.
    """

    jobs: int | None
    records: Path
    lock: "BaseFileLock"
    before: bytes | None


# The sweeps that this process has started; None for each if this is not the main process.
_started: list[Sweep | None] = []


class StartSweep(Callback):
    """Creates the folder of the records; registered in configs/config.yaml (hydra.callbacks)."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called before the first job.

        Raises:
            SystemExit: on any error; Hydra would turn any other exception into a warning and train
                without records.
        """
        try:
            self._start(config)
        except Exception as error:
            if not is_for_the_user(error):
                traceback.print_exception(error)
            console.stop("train.py", explain(error))

    def _start(self, config: DictConfig) -> None:
        from training.compose import parse_overrides

        for name in WANDB_RUN_VARS:
            os.environ.pop(name, None)
        overrides = parse_overrides(config.hydra.overrides.task)
        last = {o.get_key_element(): o for o in overrides}  # the last one for a key counts
        fixed = [key for key, override in last.items() if not override.is_sweep_override()]
        os.environ[FIXED] = " ".join(sorted(fixed))
        jobs = _number_of_jobs(config, overrides)
        if not world().is_main:
            _started.append(None)
            return
        folder = Path(config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        description = folder / DESCRIPTION
        before = description.read_bytes() if description.exists() else None
        records, lock = _make_records(folder)
        os.environ[RECORDS] = str(records)
        _started.append(Sweep(jobs, records, lock, before))


def _make_records(parent: Path) -> tuple[Path, "BaseFileLock"]:
    """Create and return the folder of the records, and a lock that shows the sweep is running.

    Also remove the folders left by sweeps that were killed.
    """
    import filelock

    for lock_file in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(filelock.Timeout, OSError), filelock.FileLock(lock_file, timeout=0):
            shutil.rmtree(lock_file.parent, ignore_errors=True)
    records = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = filelock.FileLock(records / LOCK)
    with suppress(OSError):  # without file locks, no other sweep can take it and remove the folder
        lock.acquire()
    return records, lock


def _number_of_jobs(config: DictConfig, overrides: list[Override]) -> int | None:
    """Return the number of jobs of Hydra's basic sweeper; None for any other sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from training.compose import parse_overrides

    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    (jobs,) = BasicSweeper.split_arguments([*parse_overrides(words), *overrides], None)
    return len(jobs)


# ---- A job --------------------------------------------------------------------------------------


def run_job(
    train: Callable[[DictConfig, Path], dict[str, Any]],
    cfg: DictConfig,
    run_dir: Callable[[DictConfig], Path],
    *,
    full_error: bool,
) -> float:
    """Run ``train`` on ``cfg`` in its ``run_dir``; return the top-1 accuracy or `NO_SCORE`.

    With ``resume=auto``, a job that has already finished or diverged is not trained again.

    Raises:
        SystemExit: if a signal or the time limit stops the sweep, or another process of the job
            has died.
    """
    from training import checkpoint, outcome, run_folder, settings
    from training.distributed import broadcast_from_main, process_group

    hydra = HydraConfig.get()
    fixed = fixed_settings()
    words = (word for word in hydra.overrides.task if word.partition("=")[0] not in fixed)
    record = Record(int(hydra.job.num), " ".join(words))
    _print_head(record)
    try:
        folder = run_dir(cfg)
        record.folder = str(folder)
        record.write("", "")
        settings.check(cfg, world().size)
    except (ValueError, OmegaConfBaseException) as error:
        return _no_result(record, outcome.REFUSED, explain(error), cfg)
    try:
        with process_group(compiles=cfg.compile):
            config = settings.resolve(cfg)
            # Only the main process looks, so that all processes do the same.
            before = broadcast_from_main(lambda: checkpoint.finished_before(folder, config))
            summary = train(cfg, folder) if before is None else before
        scores = run_folder.scores_line(summary)
        if before is None:
            record.write(outcome.DONE, scores)
        else:
            record.write(outcome.SKIPPED, f"finished before: {scores}")
        return run_folder.top1(summary)
    except SystemExit as stopped:
        record.write(*_from_folder(folder, None))
        # If each job has a process of its own, the time limit ends only this job.
        if stopped.code or "basic_launcher" in hydra.launcher._target_:
            raise
        return NO_SCORE
    except ConnectionError as error:
        # Every process reports another's death: the dead one may be the main process.
        console.stop("train.py", explain(error))
    except Exception as error:
        why = explain(error)
        if full_error or not is_for_the_user(error):
            traceback.print_exception(error)
            why = f"{type(error).__name__}: {why}"
        if isinstance(error, FloatingPointError | run_folder.DivergedError):
            return _no_result(record, outcome.DIVERGED, why, cfg)
        held = isinstance(error, run_folder.HeldError)
        return _no_result(record, outcome.SKIPPED if held else outcome.FAILED, why, cfg)


def _no_result(record: Record, kind: str, why: str, cfg: DictConfig) -> float:
    record.config = _settings(cfg)
    record.write(kind, why)
    if world().is_main:
        console.print_error("train.py", f"job #{record.number}: {why}")
    return NO_SCORE


def _settings(cfg: DictConfig) -> dict[str, Any] | None:
    """Return all settings of a job; None if they are invalid or cannot be written to a file."""
    from models.fields import are_plain
    from training import settings

    with suppress(ValueError, OmegaConfBaseException):
        resolved: dict[str, Any] = are_plain(settings.resolve(cfg))
        return resolved
    return None


def fixed_settings() -> set[str]:
    """Return the names of the settings on the sweep's command line that are the same in all jobs.

    Empty outside a sweep.
    """
    return set(os.environ.get(FIXED, "").split())


def _print_head(record: Record) -> None:
    """Print which job starts; in a launcher's process, also prefix each log line with the job."""
    if _started and (sweep := _started[-1]) is not None:
        of = "" if sweep.jobs is None else f" of {sweep.jobs}"
        print(f"\njob #{record.number}{of}: {record.label}", flush=True)
    elif RECORDS in os.environ:  # in a process started by the launcher
        print(f"job #{record.number}: {record.label}", flush=True)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"job #{record.number}: %(message)s"))


# ---- The end ------------------------------------------------------------------------------------


def end(error: BaseException | None) -> int | None:
    """Print the table of the sweep that this process has started, and return the exit code.

    See `training.outcome.exit_code`; ``error`` is the exception that ended the sweep, if any.
    Return None if there is no sweep, or the error came before its first job. With several
    processes, only the main process prints.
    """
    if not _started:
        return None
    from training.distributed import await_main

    sweep = _started.pop()
    code = None if sweep is None else _end_in_main(sweep, error)
    os.environ.pop(FIXED, None)
    told = await_main("" if code is None else f"{code}")
    if told is None and error is None:
        return 1  # the main process is gone
    return int(told) if told else None


def _end_in_main(sweep: Sweep, error: BaseException | None) -> int | None:
    from training import outcome

    os.environ.pop(RECORDS, None)
    records = [Record(**json.loads(path.read_text())) for path in sweep.records.glob("*.json")]
    sweep.lock.release()
    shutil.rmtree(sweep.records, ignore_errors=True)
    refused = all(record.outcome == outcome.REFUSED for record in records)
    if refused:  # nothing was trained, so undo Hydra's description of the sweep
        description = sweep.records.with_name(DESCRIPTION)
        description.unlink(missing_ok=True)
        if sweep.before is not None:
            description.write_bytes(sweep.before)
    if isinstance(error, Exception) and not records:
        return None
    for record in records:
        if not record.outcome:  # its process died or was stopped
            record.write(*_from_folder(Path(record.folder), error))
    if not refused:
        for record in records:
            _keep_reason(Path(record.folder), record.outcome, record.why, record.config)
    started = {record.number for record in records}
    missing = set(range(sweep.jobs or 0)) - started
    records += [Record(number, outcome=outcome.NOT_STARTED) for number in missing]
    records.sort(key=lambda record: record.number)
    if records:
        rows = [(f"#{r.number:<4} {r.label}", outcome.Outcome(r.outcome, r.why)) for r in records]
        lines = outcome.table(rows, "job", "the same command with resume=auto")
        print("", *lines, sep="\n", flush=True)
    return outcome.exit_code({record.outcome for record in records}, error)


def _keep_reason(folder: Path, kind: str, why: str, config: dict[str, Any] | None) -> None:
    """Save for the report why a job has no run."""
    from training import outcome, run_folder

    if kind in (outcome.REFUSED, outcome.FAILED) and config is not None:
        with suppress(OSError):  # the reason is printed anyway
            run_folder.write_no_run(folder, kind, why, config)


@contextmanager
def reason_kept(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """If a run started by the agent of a wandb sweep fails, save the reason for the report."""
    from training import outcome, run_folder

    try:
        yield
    except Exception as error:
        held = isinstance(error, run_folder.HeldError)
        if under_agent() and world().is_main and not held:
            kind = outcome.REFUSED if isinstance(error, ValueError) else outcome.FAILED
            _keep_reason(folder, kind, explain(error), _settings(cfg))
        raise


def _from_folder(folder: Path, error: BaseException | None) -> tuple[str, str]:
    """Return outcome and reason, by its run folder, of a job whose process did not report them."""
    from training import outcome

    found, _ = outcome.read(folder)
    if found.kind in (outcome.DONE, outcome.DIVERGED):
        return found
    if isinstance(error, Exception):
        return outcome.FAILED, explain(error)
    return outcome.STOPPED, "resume=auto continues it"
