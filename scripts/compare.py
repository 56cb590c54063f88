"""Train variants of a network over several seeds, then report: one command, one page.

    python scripts/compare.py
    python scripts/compare.py --seeds 0 1 2 --vary attention=none,se,aa -- model=resnet20 epochs=30
    python scripts/compare.py --vary attention=none --vary attention=aa attention.dk=0.1,0.2

A --vary stands for all combinations of its values, which are written as for train.py -m; several
add up. What stands behind ``--`` goes to every run; by default that is experiment=lookup, and it
names the comparison's folder below outputs/compare/. The same command again skips the runs that are
finished and continues the others from their last checkpoint, whatever stopped them. A run whose
loss stops being finite has a result, too: it is not run again, and the others go on.

On a machine that is lent for half an hour, ``--max-minutes 28`` leaves two for the report: the run
in progress stops with a checkpoint when they are over, and the same command goes on next time.

Exit codes: 0 all is well, also when the time is over; 1 a run failed; 2 a mistake in the settings;
130 Ctrl-C and 143 SIGTERM, of compare.py or of the run in progress.
"""

import argparse
import csv
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.schema import NO_EFFECT_ON_RESULT, register  # noqa: E402
from reporting.render import report  # noqa: E402
from training.cli import explain  # noqa: E402
from training.run_folder import FAILURE  # noqa: E402

register()

# Settings that compare.py gives each run itself, and where to say them instead.
OURS = {
    "seed": "--seeds",
    "out_dir": "--out",
    "resume": "nothing, for it always continues,",
    "hydra.run.dir": "--out",
}
# What goes to every run and names no folder: it changes no result.
NAMELESS = (*NO_EFFECT_ON_RESULT, "tracking", "max_minutes")
# How long a run may take to end after Ctrl-C, and a killed comparison's run to be gone.
PATIENCE_S = 30.0
LOCK_WAIT_S = 5.0
# A line about the whole set at most this often while a run goes on.
STATUS_EVERY_S = 60.0
# Exit codes of a run that a signal has stopped: SIGINT, SIGTERM, SIGUSR1, as shells have it.
STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))

# Not Popen's preexec_fn, which runs between fork and exec, where only C code is safe.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which outlasts exec
if os.getppid() == int(sys.argv[1]):  # else it was gone before the kernel was asked
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class RefusedError(Exception):
    """train.py refuses the settings; it has said why."""


class StoppedError(Exception):
    """A signal has stopped the run in progress; the first argument is its exit code."""


@dataclass(frozen=True)
class Run:
    """One run of the comparison: what makes it, where it lies, and how long it is."""

    variant: tuple[str, ...]
    seed: int
    folder: Path
    epochs: int

    def __str__(self) -> str:
        return f"{' '.join(self.variant)} seed={self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def failure(self) -> str | None:
        """Why the run has no result, where its loss stopped being finite."""
        try:
            return str(json.loads((self.folder / FAILURE).read_text())["error"])
        except FileNotFoundError:
            return None

    def done(self) -> tuple[int, float]:
        """Epochs that need not be trained again, and the seconds that they took."""
        try:
            with (self.folder / "metrics.csv").open() as file:
                seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        except FileNotFoundError:
            return 0, 0.0
        return len(seconds), sum(seconds)


def expand(vary: list[list[str]]) -> list[tuple[str, ...]]:
    """The variants, each as its overrides: all combinations within an entry, then the next entry.

    Raises:
        ValueError: an override of `OURS`.
        HydraException: words that are no overrides.
    """
    parser = OverridesParser.create()
    variants: list[tuple[str, ...]] = []
    for words in vary:
        axes = []
        for override in parser.parse_overrides(words):
            key = override.get_key_element()
            if override.is_sweep_override():
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            else:
                axes.append([str(override.input_line)])
        variants += itertools.product(*axes)
    return list(dict.fromkeys(variants))


def plan(
    vary: list[list[str]], seeds: list[int], overrides: list[str], out_dir: Path
) -> tuple[Path, list[Run]]:
    """The comparison's folder and its runs, seed after seed, all of their settings composed.

    Settings that change no result do not name the folder: ``max_minutes=9`` goes on where
    ``max_minutes=5`` has stopped.

    Raises:
        ValueError: a setting that is compare.py's own.
        HydraException, OmegaConfBaseException: settings that train.py does not have.
    """
    parse = OverridesParser.create().parse_overrides
    for override in parse([*itertools.chain(*vary), *overrides]):
        key = override.get_key_element()
        if key in OURS:
            raise ValueError(f"{override.input_line}: use {OURS[key]} for {key}")
    naming = [
        str(override.input_line)
        for override in parse(overrides)
        if not override.get_key_element().startswith(NAMELESS)
    ]
    comparison = (out_dir / "compare" / (as_name(naming) or "default")).absolute()
    lengths = {}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for variant in expand(vary):
            lengths[variant] = int(compose("config", [*overrides, *variant]).epochs)
    runs = [
        Run(variant, seed, comparison / as_name(variant) / f"seed={seed}", epochs)
        for seed in dict.fromkeys(seeds)
        for variant, epochs in lengths.items()
    ]
    return comparison, runs


def as_name(overrides: list[str] | tuple[str, ...]) -> str:
    """A folder's name for these overrides, with a digest where it cannot show all of them."""
    text = ",".join(overrides)
    name = re.sub(r"[^\w.,=+\[\]-]+", "-", text)[:150]
    if name == text:
        return name
    return f"{name}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def train(
    run: Run,
    overrides: list[str],
    out_dir: Path,
    minutes: float | None,
    lock: int,
    status: Callable[[], str],
) -> int:
    """One run of train.py, continued if there is a part of it; its exit code.

    Now and then ``status`` is printed, behind an epoch.

    It ends with this process, however that ends, so that two never write to one folder: on Linux
    the kernel sees to it. Elsewhere a run that outlives a killed compare.py keeps ``lock``, and the
    next compare.py waits for it. Ctrl-C reaches this process alone, which passes it on once.
    """
    command = [sys.executable]
    if sys.platform == "linux":
        command += ["-c", DIE_WITH_PARENT, str(os.getpid())]
    command += [str(ROOT / "train.py"), *overrides, *run.variant]
    command += [f"seed={run.seed}", "resume=auto"]
    command += [f"out_dir={quoted(out_dir.absolute())}", f"hydra.run.dir={quoted(run.folder)}"]
    if minutes is not None:
        command.append(f"max_minutes={minutes:.3f}")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=(lock,),
        start_new_session=True,
    )
    try:
        epochs, printed = run.done()[0], time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(1.0)
            if run.done()[0] > epochs and time.monotonic() - printed >= STATUS_EVERY_S:
                epochs, printed = run.done()[0], time.monotonic()
                print(status(), flush=True)
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
        raise


def quoted(path: Path) -> str:
    """For Hydra, which would read the "=" of a folder's name as its own."""
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


@contextmanager
def locked(comparison: Path, out_dir: Path) -> Iterator[int]:
    """Hold the comparison's folder; yields the open file whose inheritors hold it as well.

    Raises:
        ValueError: it is held by others.
    """
    path, deadline = comparison / "lock", time.monotonic() + LOCK_WAIT_S
    while True:
        comparison.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it before may have removed the file between the two lines above.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise ValueError(
                    f"another compare.py, or a run that it left, is at work in {comparison}"
                ) from None
        file.close()
        time.sleep(0.1)
    with file:
        try:
            yield file.fileno()
        finally:
            remove_unused(path, out_dir)


def remove_unused(lock: Path, out_dir: Path) -> None:
    """Remove the lock's folder if no run has written to it, and those above up to ``out_dir``."""
    if list(lock.parent.iterdir()) != [lock]:
        return
    lock.unlink()
    for folder in lock.parents:
        if out_dir.absolute() not in folder.parents or any(folder.iterdir()):
            return
        folder.rmdir()


def seconds_left(runs: list[Run]) -> float | None:
    """What the unfinished of ``runs`` will take, at the pace of their variant's epochs so far.

    A variant without any takes the pace of all the others; None if there is no epoch at all.
    """
    done = {run: run.done() for run in runs}

    def pace(group: list[Run]) -> float | None:
        epochs, seconds = map(sum, zip(*(done[run] for run in group), strict=True))
        return seconds / epochs if epochs else None

    overall = pace(runs)
    if overall is None:
        return None
    total = 0.0
    for run in runs:
        if not run.finished and run.failure is None:
            own = pace([other for other in runs if other.variant == run.variant])
            total += (run.epochs - done[run][0]) * (overall if own is None else own)
    return total


def as_time(seconds: float | None) -> str:
    """Seconds in words, to two digits or so."""
    if seconds is None:
        return "time unknown"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def progress(runs: list[Run], number: int) -> str:
    """One line on run ``number`` (from 0), and where the whole set stands."""
    run = runs[number]
    head = f"[{number + 1}/{len(runs)}] {run}:"
    if run.finished:
        return f"{head} finished before"
    if run.failure is not None:
        return f"{head} failed before, and is left so: {run.failure}"
    finished, epochs = sum(r.finished for r in runs), run.done()[0]
    what = f"behind epoch {epochs} of {run.epochs}" if epochs else "training"
    return f"{head} {what} ({finished} done, {as_time(seconds_left(runs))} to go)"


def train_all(
    runs: list[Run], overrides: list[str], out_dir: Path, max_minutes: float | None, lock: int
) -> dict[Run, str]:
    """Train what is missing, until all is done or the time is up; the runs that failed, and why.

    Raises:
        RefusedError: train.py refuses the settings of a run.
        StoppedError: a signal has stopped a run.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    failed = {}
    for number, run in enumerate(runs):
        print(progress(runs, number), flush=True)
        if not run.finished and run.failure is None:
            minutes = None if deadline is None else (deadline - time.monotonic()) / 60
            code = 0
            if minutes is None or minutes > 0:
                status = partial(progress, runs, number)
                code = train(run, overrides, out_dir, minutes, lock, status)
            if code == 0 and not run.finished:
                left = sum(not r.finished and r.failure is None for r in runs)
                print(f"the time is over with {left} runs to go; the same command goes on")
                break
            if code in STOPPED:
                raise StoppedError(code)
            if code == 2 and run.failure is None:
                raise RefusedError
            if code != 0 and run.failure is None:
                failed[run] = f"train.py ended with code {code}"
        if run.failure is not None:
            failed[run] = f"{run.failure}; without {run.folder} it would be run again"
    return failed


def compare(
    vary: list[list[str]],
    seeds: list[int],
    overrides: list[str],
    out_dir: Path,
    max_minutes: float | None = None,
) -> int:
    """Run what is missing of the comparison, write its report, and return the exit code.

    Raises:
        RefusedError, StoppedError, ValueError, OSError, HydraException, OmegaConfBaseException:
            see `plan`, `locked` and `train_all`.
    """
    comparison, runs = plan(vary, seeds, overrides, out_dir)
    if max_minutes is not None:
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.get_key_element() == "max_minutes":
                raise ValueError(
                    f"{override.input_line} is for each run and --max-minutes={max_minutes:g} for "
                    "all of them: use one"
                )
    with locked(comparison, out_dir) as lock:
        failed = train_all(runs, overrides, out_dir, max_minutes, lock)
    if any(run.finished for run in runs):
        print("", report([comparison], comparison), sep="\n")
        print(f"written: {comparison / 'report.html'}")
    else:
        print("no run is finished: there is nothing to report yet")
    for run, reason in failed.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def interrupt(signum: int, _: Any) -> None:
    raise KeyboardInterrupt(128 + signum)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="see the head of this file for examples"
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        action="append",
        metavar="KEY=VALUES",
        help="combinations of settings; may be given several times (default: attention=none,aa)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs", metavar="FOLDER")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="for all runs together")
    parser.add_argument("overrides", nargs="*", default=["experiment=lookup"], help="for every run")
    given = parser.parse_args()
    if given.max_minutes is not None and not given.max_minutes > 0:
        parser.error(f"--max-minutes={given.max_minutes} must be positive")
    # A queue's SIGTERM and a terminal that closes end the running train.py as cleanly as Ctrl-C.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    vary = given.vary or [["attention=none,aa"]]
    try:
        sys.exit(compare(vary, given.seeds, given.overrides, given.out, given.max_minutes))
    except RefusedError:
        sys.exit(2)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        print(f"compare.py: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, StoppedError) as stopped:
        again = shlex.join(["python", *sys.argv])
        print(f"compare.py: stopped; the same command goes on: {again}", file=sys.stderr)
        sys.exit(stopped.args[0] if stopped.args else STOPPED[0])


if __name__ == "__main__":
    main()
