"""Train variants of a network over several seeds, then report: one command, one page.

    python scripts/compare.py
    python scripts/compare.py --seeds 0 1 2 --vary attention=none,se,aa -- model=resnet20 epochs=30
    python scripts/compare.py --vary attention=none --vary attention=aa attention.dk=0.1,0.2

Each --vary stands for all combinations of its values, which are written as for train.py -m; several
add up. What comes after ``--`` goes to every run; by default that is experiment=lookup, and it
names the comparison's folder below outputs/compare/. The same command again skips the runs that are
finished and continues the others from their last checkpoint, whatever stopped them. A run that
diverged has a result, too: it is not run again, and the others are. Several compare.py may work on
one comparison: each takes the runs that no other process is training.

On a machine that is lent for half an hour, ``--max-minutes 28`` leaves two for the report: the run
in progress stops with a checkpoint when they are over, and the same command continues next time.

Exit codes: 0 all is well, also when the time is over; 1 a run failed; 2 a mistake in the settings;
130 Ctrl-C, 143 SIGTERM, 129 a closed terminal, of compare.py or of the run in progress (which may
also end with 138, SIGUSR1).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from scripts.command import start

    start(__file__)  # which imports this file as a module, and does not return

import argparse
import itertools
import logging
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from configs.schema import names_folder
from reporting import dashboard, render
from reporting.analysis import analyze
from scripts.command import command
from training import console, launch, run_folder
from training.compose import compose_config
from training.records import UnreadableError, nonfinite
from training.variants import folder_name, name_of_images

ROOT = Path(__file__).resolve().parent.parent
# Settings that compare.py gives each run itself, and where to say them instead.
OURS = {
    "seed": "--seeds",
    "out_dir": "--out",
    "resume": "nothing, for it always continues,",
    "run_dir": "--out",
    "hydra.run.dir": "--out",
}
# The status of the whole set is printed at most this often while a run is training.
STATUS_EVERY_S = 60.0
# With fewer seeds than this an interval says little.
ENOUGH_SEEDS = 3
# What the commands that are named at the end do.
PURPOSES = {
    "evaluate.py": "  # classes, calibration, speed",
    "visualize.py": "  # what attention looks at",
    "compare.py": f"  # {ENOUGH_SEEDS} seeds: an interval",
    "export.py": "  # ONNX and torch.export",
}
# Exit codes of a run that a signal has stopped, as shells have them.
STOPPED = tuple(
    128 + getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)
)


class RefusedError(Exception):
    """train.py refuses the settings; it has said why."""


class StoppedError(Exception):
    """A signal has stopped the run in progress; the first argument is its exit code."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the comparison: what makes it, its folder, and how many epochs it has."""

    variant: tuple[str, ...]
    seed: int
    folder: Path
    epochs: int

    def __str__(self) -> str:
        return f"{' '.join(self.variant)} seed={self.seed}"

    @property
    def finished(self) -> bool:
        """Whether there is a result: a summary that can be read, of finite scores."""
        return self.failure is None and (self.folder / run_folder.SUMMARY).exists()

    @property
    def failure(self) -> str | None:
        """Why the run has no result and gets none by more training: it diverged or is damaged."""
        try:
            error = run_folder.read_failure(self.folder)
            if error is None and (self.folder / run_folder.SUMMARY).exists():
                summary, _ = run_folder.read_result(self.folder)
                fault = nonfinite(summary)
                error = fault and f"{fault} in its summary"
            self.done()
        except UnreadableError as damage:
            return f"{damage}; remove that file to train the run again"
        return error and f"{error}; remove {self.folder} to train the run again"

    @property
    def missing(self) -> bool:
        """Whether there is something left to train."""
        return not self.finished and self.failure is None

    def done(self) -> tuple[int, float]:
        """Epochs that need not be trained again, and the seconds that they took.

        Raises:
            UnreadableError: metrics.csv is damaged.
        """
        try:
            rows = run_folder.read_metrics(self.folder)
        except FileNotFoundError:
            return 0, 0.0
        return len(rows), sum(row["perf/epoch_seconds"] for row in rows)


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
) -> tuple[Path, list[PlannedRun]]:
    """The comparison's folder and its runs, seed after seed, all of their settings composed.

    Settings that change no result do not name the folder: ``max_minutes=9`` continues where
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
        if names_folder(override.get_key_element())
    ]
    naming += name_of_images(compose_config(overrides), naming)
    lengths = {v: int(compose_config([*overrides, *v]).epochs) for v in expand(vary)}
    comparison = (out_dir / "compare" / (folder_name(naming) or "default")).absolute()
    runs = [
        PlannedRun(variant, seed, comparison / folder_name(variant) / f"seed={seed}", epochs)
        for seed in dict.fromkeys(seeds)
        for variant, epochs in lengths.items()
    ]
    return comparison, runs


def wandb_group(overrides: list[str], comparison: Path) -> list[str]:
    """The override by which the dashboard shows the runs together, unless the user gave another."""
    given = OverridesParser.create().parse_overrides(overrides)
    if any(override.get_key_element() == "wandb.group" for override in given):
        return []
    return [f"wandb.group={launch.hydra_quote(comparison.name)}"]


def train(
    run: PlannedRun,
    overrides: list[str],
    out_dir: Path,
    minutes: float | None,
    status: Callable[[], str],
) -> int:
    """Train one run with train.py, or what is missing of it; its exit code.

    Now and then ``status`` is printed, after an epoch. Ctrl-C reaches this process alone, which
    passes it on once. A run that outlives a killed compare.py keeps its folder and is left to
    finish.
    """
    words = [*overrides, *run.variant, f"seed={run.seed}", "resume=auto"]
    if minutes is not None:
        words.append(f"max_minutes={minutes:.3f}")
    epochs, printed = run.done()[0], time.monotonic()
    process = launch.start(words, run.folder, out_dir, train=ROOT / "train.py")
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(1.0)
            if run.done()[0] > epochs and time.monotonic() - printed >= STATUS_EVERY_S:
                epochs, printed = run.done()[0], time.monotonic()
                print(status(), flush=True)
    except BaseException:
        launch.interrupt(process)
        raise


def seconds_left(runs: list[PlannedRun]) -> float | None:
    """What the unfinished of ``runs`` will take, at the pace of their variant's epochs so far.

    A variant without any takes the pace of all the others; None if there is no epoch at all.
    """
    done = {run: (0, 0.0) if run.failure is not None else run.done() for run in runs}

    def pace(group: list[PlannedRun]) -> float | None:
        epochs, seconds = map(sum, zip(*(done[run] for run in group), strict=True))
        return seconds / epochs if epochs else None

    overall = pace(runs)
    if overall is None:
        return None
    total = 0.0
    for run in runs:
        if run.missing:
            own = pace([other for other in runs if other.variant == run.variant])
            total += (run.epochs - done[run][0]) * (overall if own is None else own)
    return total


def format_eta(seconds: float | None) -> str:
    """Seconds in words, to two digits or so."""
    if seconds is None:
        return "time left unknown"
    if seconds < 100:
        return f"about {seconds:.0f} s left"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


def progress(runs: list[PlannedRun], number: int) -> str:
    """One line on run ``number`` (from 0), and where the whole set is."""
    run = runs[number]
    head = f"[{number + 1}/{len(runs)}] {run}:"
    if run.failure is not None:
        return f"{head} failed before: {run.failure}"
    if run.finished:
        return f"{head} already finished"
    finished, epochs = sum(r.finished for r in runs), run.done()[0]
    what = f"after epoch {epochs} of {run.epochs}" if epochs else "training"
    return f"{head} {what} ({finished} finished, {format_eta(seconds_left(runs))})"


def train_all(
    runs: list[PlannedRun], overrides: list[str], out_dir: Path, max_minutes: float | None
) -> dict[PlannedRun, str]:
    """Train what is missing, until all is done or the time is up; the runs that failed, and why.

    Raises:
        RefusedError: train.py refuses the settings of a run.
        StoppedError: a signal has stopped a run.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    failed = {}
    for number, run in enumerate(runs):
        if run.missing and skipped(run, f"[{number + 1}/{len(runs)}] "):
            continue
        print(progress(runs, number), flush=True)
        if run.missing:
            minutes = None if deadline is None else (deadline - time.monotonic()) / 60
            code = 0
            if minutes is None or minutes > 0:
                code = train(run, overrides, out_dir, minutes, partial(progress, runs, number))
            if code == 0 and run.missing:
                left = sum(r.missing for r in runs)
                what = "1 run" if left == 1 else f"{left} runs"
                print(f"the time is over with {what} left; the same command continues")
                break
            if code in STOPPED:
                raise StoppedError(code)
            if code == 2 and run.missing and not skipped(run):
                raise RefusedError
            if code not in (0, 2) and run.missing:
                failed[run] = f"train.py ended with code {code}"
        if run.failure is not None:
            failed[run] = run.failure
    return failed


def skipped(run: PlannedRun, head: str = "") -> bool:
    """Whether another process trains the run; if so, it is printed."""
    holder = run_folder.holder(run.folder)
    if holder is not None:
        print(f"{head}{run}: skipped, in progress in {holder}", flush=True)
    return holder is not None


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
            see `plan` and `train_all`.
    """
    comparison, runs = plan(vary, seeds, overrides, out_dir)
    if max_minutes is not None:
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.get_key_element() == "max_minutes":
                raise ValueError(
                    f"{override.input_line} is for each run and --max-minutes={max_minutes:g} for "
                    "all of them: use one"
                )
    before = {run for run in runs if run.finished}
    grouped = [*overrides, *wandb_group(overrides, comparison)]
    tracking = compose_config(grouped).wandb
    failed = train_all(runs, grouped, out_dir, max_minutes)
    finished = {run for run in runs if run.finished}
    if finished:
        analysis = analyze([comparison])
        print("", render.write(analysis, comparison), sep="\n")
        print(f"written: {comparison / 'report.html'}")
        if finished - before and tracking.mode.name != "disabled":
            dashboard.post(
                analysis,
                comparison / "report.html",
                out_dir=out_dir,
                group=tracking.group,
                project=tracking.project,
                entity=tracking.entity,
                mode=tracking.mode.name,
            )
    if not finished:
        print("no run is finished: there is nothing to report yet")
    elif not failed and len(finished) == len(runs):
        commands = next_commands(runs, vary, overrides, out_dir)
        if commands:
            print("next:", *(f"  {command}" for command in commands), sep="\n")
    for run, reason in failed.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def next_commands(
    runs: list[PlannedRun], vary: list[list[str]], overrides: list[str], out_dir: Path
) -> list[str]:
    """Three commands for whoever has the finished ``runs``, to be pasted where this was called."""
    kept = [run for run in runs if (run.folder / run_folder.WEIGHTS).is_file()]
    if not kept:  # of older code
        return []
    folders = [shown(run.folder) for run in kept if run.seed == kept[0].seed]
    augmented = next((run for run in kept if has_attention(run)), None)
    commands = [["evaluate.py", *folders]]
    if augmented is not None:
        commands.append(["visualize.py", shown(augmented.folder)])
    seeds = sorted({run.seed for run in runs})
    if len(seeds) < ENOUGH_SEEDS:
        more = seeds + [s for s in range(max(seeds) + ENOUGH_SEEDS) if s not in seeds]
        words = ["compare.py", "--seeds", *map(str, more[:ENOUGH_SEEDS])]
        words += [word for group in vary for word in ("--vary", *group)]
        if out_dir.absolute() != (ROOT / "outputs").absolute():
            words += ["--out", shown(out_dir)]
        commands.append([*words, "--", *overrides])
    commands.append(["export.py", shown((augmented or kept[0]).folder)])
    python = shown(Path(sys.executable)) if sys.executable else "python"
    return [
        f"{shlex.join([python, shown(ROOT / 'scripts' / script), *words])}{PURPOSES[script]}"
        for script, *words in commands[:3]
    ]


def has_attention(run: PlannedRun) -> bool:
    """Whether the network of a finished run has attention to look at."""
    return bool(run_folder.read_summary(run.folder)["attention"] == "aa")


def shown(path: Path) -> str:
    """A path as it is shortest from here; links stay links, as .venv/bin/python is one."""
    path = path.absolute()
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def interrupt(signum: int, _: Any) -> None:
    raise KeyboardInterrupt(128 + signum)


def handle_signals() -> None:
    """A queue's SIGTERM and a terminal that closes end the running train.py as Ctrl-C does."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "--vary",
        nargs="+",
        action="append",
        metavar="KEY=VALUES",
        help="combinations of settings; may be given several times (default: attention=none,aa)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="a run of each variant (default: 0)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs", metavar="FOLDER", help="default: outputs/"
    )
    parser.add_argument("--max-minutes", type=float, metavar="M", help="for all runs together")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="-- KEY=VALUE",
        default=["experiment=lookup"],
        help="settings of every run (default: experiment=lookup)",
    )


@command(options)
def main(args: argparse.Namespace) -> None:
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise ValueError(f"--max-minutes={args.max_minutes} must be positive")
    handle_signals()
    vary = args.vary or [["attention=none,aa"]]
    # What is said of the dashboard, as train.py says it.
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    try:
        sys.exit(compare(vary, args.seeds, args.overrides, args.out, args.max_minutes))
    except RefusedError:
        sys.exit(2)
    except (KeyboardInterrupt, StoppedError) as stopped:
        again = shlex.join(["python", *sys.argv])
        code = stopped.args[0] if stopped.args else STOPPED[0]
        console.stop("compare.py", f"stopped; the same command continues: {again}", code)
