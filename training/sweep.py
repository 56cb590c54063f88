"""The jobs of ``train.py -m``, and what became of each, whichever sweeper and launcher run them.

A job returns its score, or `NO_SCORE`, and does not raise: it never ends the sweep, neither that of
Hydra's own sweeper nor the study of one that searches. Each job writes a record into a folder that
is made before the first one, because a launcher may run it in another process; the table at the end
is made of these records.
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

# What a sweeper that searches is told of a job without a result: the lowest top-1 accuracy.
NO_SCORE = 0.0
# The folder of the sweep's records, for the processes that a launcher starts.
RECORDS = "AACONV_SWEEP"
# The names of the settings that are the same in all jobs, for the same processes.
FIXED = "AACONV_SWEEP_FIXED"
PREFIX, LOCK = ".sweep-", "lock"
# What Hydra writes of a sweep.
DESCRIPTION = "multirun.yaml"


@dataclass
class Record:
    """A job: its number, what tells it from others, its run's folder, what became of it and why.

    ``label`` has its overrides but for those that all jobs have. ``outcome`` is one of
    `training.outcome.ALL`, or empty while it is trained. ``config`` has its settings where it has
    no result.
    """

    number: int
    label: str = ""
    folder: str = ""
    outcome: str = ""
    why: str = ""
    config: dict[str, Any] | None = None

    def write(self, kind: str, why: str) -> None:
        """Note what became of the job, where other processes of the sweep find it."""
        self.outcome, self.why = kind, why
        if world().is_main and RECORDS in os.environ:
            write_json(Path(os.environ[RECORDS]) / f"{self.number}.json", asdict(self))


class Sweep(NamedTuple):
    """A sweep that this process, the main one, has started and keeps the records of.

    Attributes:
        jobs: their number, if known.
        records: their folder, below the sweep's, and ``lock`` its lock.
        before: what `DESCRIPTION`, which is beside it, held before, if it was there.
    """

    jobs: int | None
    records: Path
    lock: "BaseFileLock"
    before: bytes | None


# The sweeps that this process has started; None for each where it is not the main one.
_started: list[Sweep | None] = []


class StartSweep(Callback):
    """Makes the folder of the records; ``hydra.callbacks`` in configs/config.yaml names it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called before the first job.

        Raises:
            SystemExit: there is something wrong; of any other exception Hydra would make a warning,
                and train without records.
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
        last = {o.get_key_element(): o for o in overrides}  # which counts
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
    """The folder of the records, and the lock by which others see that its sweep still runs.

    Those that sweeps have left here which were killed are removed.
    """
    import filelock

    for lock_file in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(filelock.Timeout, OSError), filelock.FileLock(lock_file, timeout=0):
            shutil.rmtree(lock_file.parent, ignore_errors=True)
    records = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = filelock.FileLock(records / LOCK)
    with suppress(OSError):  # a file system that has none: nobody takes it, either
        lock.acquire()
    return records, lock


def _number_of_jobs(config: DictConfig, overrides: list[Override]) -> int | None:
    """All combinations, where Hydra's own sweeper makes them; a search has no such number."""
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
    """Train ``cfg`` in its ``run_dir`` by ``train``, and return its top-1 accuracy, or `NO_SCORE`.

    With ``resume=auto`` a job that has a result, good or bad, is not begun again.

    Raises:
        SystemExit: a signal stops the sweep, or the end of the time; or another of several
            processes has died.
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
            # The main process alone looks, and so all of several do the same.
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
        # Where each job has a process of its own, the time is over for that one alone.
        if stopped.code or "basic_launcher" in hydra.launcher._target_:
            raise
        return NO_SCORE
    except ConnectionError as error:
        # Each process tells of another's death: the main one may be the dead one.
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
    """All settings of a job; None where no file can hold them, which it may be refused for."""
    from models.fields import are_plain
    from training import settings

    with suppress(ValueError, OmegaConfBaseException):
        resolved: dict[str, Any] = are_plain(settings.resolve(cfg))
        return resolved
    return None


def fixed_settings() -> set[str]:
    """The settings of the sweep's command that are the same in all its jobs; outside of one none.

    A setting that its command does not name is not among them.
    """
    return set(os.environ.get(FIXED, "").split())


def _print_head(record: Record) -> None:
    """Say which job begins; where others are trained meanwhile, each line will say whose it is."""
    if _started and (sweep := _started[-1]) is not None:
        of = "" if sweep.jobs is None else f" of {sweep.jobs}"
        print(f"\njob #{record.number}{of}: {record.label}", flush=True)
    elif RECORDS in os.environ:  # in a process of the launcher's
        print(f"job #{record.number}: {record.label}", flush=True)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"job #{record.number}: %(message)s"))


# ---- The end ------------------------------------------------------------------------------------


def end(error: BaseException | None) -> int | None:
    """Print the table of the sweep that this process has started, and return the exit code.

    It is 0 if all jobs have a result, 1 if one has none, 2 if all were refused; or that of
    ``error``, which has ended the sweep, where it is an exit or Ctrl-C. None where there is no
    sweep, or the error came before its first job. Of several processes the main one prints.
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
    if refused:  # nothing has been done: Hydra's file tells of it
        description = sweep.records.with_name(DESCRIPTION)
        description.unlink(missing_ok=True)
        if sweep.before is not None:
            description.write_bytes(sweep.before)
    if isinstance(error, Exception) and not records:
        return None
    for record in records:
        if not record.outcome:  # its process has died, or was told to stop
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
    """Leave for the report why a job has no run."""
    from training import outcome, run_folder

    if kind in (outcome.REFUSED, outcome.FAILED) and config is not None:
        with suppress(OSError):  # what is printed says it as well
            run_folder.write_no_run(folder, kind, why, config)


@contextmanager
def reason_kept(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Inside a run: where an agent of a wandb sweep has started it, leave why there is none."""
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
    """What the run's folder says of a job whose process has left no word."""
    from training import outcome

    found, _ = outcome.read(folder)
    if found.kind in (outcome.DONE, outcome.DIVERGED):
        return found
    if isinstance(error, Exception):
        return outcome.FAILED, explain(error)
    return outcome.STOPPED, "resume=auto continues it"
