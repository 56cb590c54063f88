"""Train variants of a network over several seeds, then report: one command, one page.

    python scripts/compare.py
    python scripts/compare.py --seeds 0 1 2 --vary attention=none,se,aa -- model=resnet20 epochs=30
    python scripts/compare.py --vary attention=none --vary attention=aa attention.dk=0.1,0.2

Each --vary adds all combinations of its values, which are written as for train.py -m. What comes
after ``--`` goes to every run; by default that is experiment=lookup, and it names the comparison's
folder below outputs/compare/. Running the same command again skips finished runs and continues the
others from their last checkpoint, whatever stopped them. A run that diverged is not repeated; the
others go on. Several compare.py may work on one comparison: each takes runs that no other process
is training. A table at the end says what became of each run.

On a machine that you have for half an hour, ``--max-minutes 28`` leaves two minutes for the report:
when time is up, the run in progress stops with a checkpoint; the same command continues next time.

Exit codes: 0 success, also when time is up; 1 a run failed or diverged; 2 a mistake in the
settings; 130 Ctrl-C, 143 SIGTERM, 129 a closed terminal, of compare.py or of the run in progress
(which may also end with 138, SIGUSR1).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from scripts.command import check_out, command, number, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument(
        "--vary",
        nargs="+",
        action="append",
        metavar="KEY=VALUES",
        help="combinations of settings; may be given several times (default: attention=none,aa)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=number(int, at_least=0),
        default=[0],
        help="seeds; each variant is trained once per seed (default: 0)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs", metavar="FOLDER", help="default: outputs/"
    )
    parser.add_argument(
        "--max-minutes",
        type=number(float, above=0),
        metavar="M",
        help="time limit for all runs together",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="-- KEY=VALUE",
        default=["experiment=lookup"],
        help="settings of every run (default: experiment=lookup)",
    )


if __name__ == "__main__":
    start(__file__, options)

import logging
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from reporting import dashboard, render
from reporting.analysis import analyze
from training import console, launch, outcome, run_folder, sweep
from training.comparison import PlannedRun, numbered, plan, status
from training.compose import compose_config
from training.outcome import BAD, DONE, STOPPED, Outcome

# How often the status of all runs is checked while one is training.
STATUS_EVERY_S = 60.0
# With fewer seeds than this an interval says little.
ENOUGH_SEEDS = 3
PURPOSES = {
    "evaluate.py": "classes, calibration, speed",
    "visualize.py": "what attention looks at",
    "compare.py": f"{ENOUGH_SEEDS} seeds: an interval",
    "export.py": "ONNX and torch.export",
}


def train_all(
    runs: list[PlannedRun], overrides: list[str], out_dir: Path, max_minutes: float | None
) -> Iterator[tuple[PlannedRun, Outcome]]:
    """Train what is missing until all is done or time is up; yield each run and its outcome.

    Raises:
        KeyboardInterrupt: see `train`.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    for run in runs:
        ended = outcome.in_progress(run.folder) if run.missing else run.outcome
        if ended is None:
            limit = []
            if deadline is not None:
                minutes = (deadline - time.monotonic()) / 60
                if minutes < 0.001:  # would be printed as 0.000
                    return
                limit = [f"max_minutes={minutes:.3f}"]
            ended = train(runs, run, [*overrides, *limit], out_dir)
        yield run, ended
        if ended.kind == STOPPED:
            return


def train(runs: list[PlannedRun], run: PlannedRun, overrides: list[str], out_dir: Path) -> Outcome:
    """Train one of ``runs``, or what is missing of it, in a separate process.

    Meanwhile the status of all runs is printed whenever it changes. A signal reaches only this
    process, which passes it on once. If compare.py is killed, a run that survives keeps its folder
    and finishes.

    Raises:
        KeyboardInterrupt: if a signal stopped the run; the argument is the exit code.
    """
    words = [*overrides, *run.variant, f"seed={run.seed}", "resume=auto"]
    printed = ""
    keys, own = ({w.partition("=")[0] for w in some} for some in (overrides, run.variant))
    fixed = " ".join(sorted(keys - own))  # the run's name on the dashboard leaves them out
    with tempfile.TemporaryDirectory() as folder:
        reason = Path(folder) / "reason"
        env = os.environ | {launch.REASON: str(reason), sweep.FIXED: fixed}
        process = launch.start(words, run.folder, out_dir, env)
        try:
            while process.poll() is None:
                line = status(runs, run)
                if line != printed:
                    print(line, flush=True)
                printed = line
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STATUS_EVERY_S)
        except BaseException:
            launch.interrupt(process)
            raise
        why = reason.read_text("utf-8", "surrogateescape") if reason.exists() else ""
    if process.returncode in outcome.STOP_CODES:
        raise KeyboardInterrupt(process.returncode)
    return outcome.of_process(run.outcome, run.folder, process.returncode, why)


def compare(
    vary: list[list[str]],
    seeds: list[int],
    overrides: list[str],
    out_dir: Path,
    max_minutes: float | None = None,
) -> int:
    """Train what is missing of the comparison, write its report, and return the exit code.

    Raises:
        ValueError, OSError, HydraException, OmegaConfBaseException: see `plan`.
    """
    comparison, runs = plan(vary, seeds, overrides, out_dir)
    before = {run for run in runs if run.outcome.kind == DONE}
    # The dashboard shows the runs as this group, unless the user gives another one.
    group = [] if "WANDB_RUN_GROUP" in os.environ else [comparison.name]
    grouped = [*(launch.override("wandb.group", name) for name in group), *overrides]
    outcomes: dict[PlannedRun, Outcome] = {}
    stopped = None
    try:
        for run, ended in train_all(runs, grouped, out_dir, max_minutes):
            outcomes[run] = ended
            if ended.kind in BAD:
                console.print_error("compare.py", f"{run}: {ended.why}")
    except KeyboardInterrupt as error:
        stopped = error
    outcomes = {run: outcomes.get(run, run.outcome) for run in runs}
    rows = [(numbered(runs, run), ended) for run, ended in outcomes.items()]
    print("", *outcome.table(rows, "run", "the same command"), sep="\n", flush=True)
    finished = [run for run, ended in outcomes.items() if ended.kind == DONE]
    if finished and stopped is None:
        report(comparison, grouped, out_dir, has_news=not before.issuperset(finished))
    if finished == runs:
        commands = next_commands(runs, vary, overrides, out_dir)
        print("next:", *(f"  {line}" for line in commands), sep="\n")
    return outcome.exit_code({ended.kind for ended in outcomes.values()}, stopped)


def report(comparison: Path, overrides: list[str], out_dir: Path, has_news: bool) -> None:
    """Write and print the comparison's report; if it ``has_news``, post it to the dashboard."""
    analysis = analyze([comparison])
    print("", render.write(analysis, comparison), sep="\n")
    print(f"written: {comparison / 'report.html'}")
    tracking = compose_config(overrides).wandb
    if has_news and tracking.mode.name != "disabled":
        dashboard.post(
            analysis,
            comparison / "report.html",
            out_dir=out_dir,
            group=tracking.group,
            project=tracking.project,
            entity=tracking.entity,
            mode=tracking.mode.name,
        )


def next_commands(
    runs: list[PlannedRun], vary: list[list[str]], overrides: list[str], out_dir: Path
) -> list[str]:
    """Return up to three commands to run next from the current folder."""
    first = [run for run in runs if run.seed == runs[0].seed]
    augmented = [r for r in first if run_folder.read_summary(r.folder)["attention"] == "aa"]
    # What is saved with a network does not say where its images are.
    where = [word for word in overrides if word.startswith("data.root=")]
    commands = [["evaluate.py", *(_shown(run.folder) for run in first), *where]]
    commands += [["visualize.py", _shown(run.folder), *where] for run in augmented[:1]]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    if len(seeds) < ENOUGH_SEEDS:
        more = seeds + [s for s in range(max(seeds) + ENOUGH_SEEDS) if s not in seeds]
        words = [word for group in vary for word in ("--vary", *group)]
        if out_dir.absolute() != ROOT / "outputs":
            words += ["--out", _shown(out_dir)]
        words = [*map(str, more[:ENOUGH_SEEDS]), *words, "--", *overrides]
        commands.append(["compare.py", "--seeds", *words])
    commands.append(["export.py", _shown((augmented or first)[0].folder)])
    python = _shown(Path(sys.executable)) if sys.executable else "python"
    return [
        f"{shlex.join([python, _shown(ROOT / 'scripts' / script), *words])}  # {PURPOSES[script]}"
        for script, *words in commands[:3]
    ]


def _shown(path: Path) -> str:
    """Shorten a path relative to the current folder; links such as .venv/bin/python stay links."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def handle_signals() -> None:
    """Make SIGTERM from a queue and a closed terminal stop the running train.py like Ctrl-C."""

    def interrupt(signum: int, _: Any) -> None:
        raise KeyboardInterrupt(128 + signum)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


@command(options)
def main(args: argparse.Namespace) -> None:
    handle_signals()
    # Prints messages about the dashboard as train.py does.
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    check_out(args.out)
    vary = args.vary or [["attention=none,aa"]]
    sys.exit(compare(vary, args.seeds, args.overrides, args.out, args.max_minutes))
