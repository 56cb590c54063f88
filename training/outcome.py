"""How a run ended: one set of words for a sweep's jobs, for compare.py and for the report.

What the files of a run's folder say comes first, whatever its process ended with.
"""

import signal
from pathlib import Path
from typing import NamedTuple

from models.fields import UnreadableError
from training import run_folder
from training.records import Summary, nonfinite

# summary.json and metrics.csv of a finished run.
Result = tuple[Summary, list[dict[str, float]]]

# What can become of a run, in the order in which it is counted.
DONE, SKIPPED, STOPPED = "done", "skipped", "stopped"
DIVERGED, FAILED, REFUSED, NOT_STARTED = "diverged", "failed", "refused", "not started"
ALL = (DONE, SKIPPED, STOPPED, DIVERGED, FAILED, REFUSED, NOT_STARTED)
# Such a run has no result.
BAD = (DIVERGED, FAILED, REFUSED)
# There is something left to train.
UNFINISHED = (STOPPED, NOT_STARTED)
# The same command may give it a result.
WILL_RESUME = (*UNFINISHED, FAILED)

# Exit codes of a run that SIGINT, SIGUSR1 or SIGTERM has stopped, as shells have them.
STOP_CODES = (130, 138, 143)


class Outcome(NamedTuple):
    """What became of a run, one of `ALL`, and what there is to say of it."""

    kind: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind


def read(folder: Path) -> tuple[Outcome, Result | None]:
    """What the files of a run's folder say, and its result if it is `DONE`.

    It is `FAILED` where they are damaged, and `NOT_STARTED` where there are none to continue from.
    """
    try:
        failure = run_folder.read_failure(folder)
        if failure is not None:
            return Outcome(DIVERGED, failure["error"]), None
        try:
            result = run_folder.read_result(folder)
        except FileNotFoundError:
            return _unfinished(folder), None
    except UnreadableError as error:
        return Outcome(FAILED, str(error)), None
    broken = _nonfinite(result)
    if broken is not None:
        return Outcome(DIVERGED, broken), None
    return Outcome(DONE, run_folder.scores_line(result[0])), result


def of_process(found: Outcome, folder: Path, code: int, line: str) -> Outcome:
    """What became of the run of a process that has ended with ``code`` and told ``line``.

    ``found`` is what its files say.
    """
    if found.kind not in UNFINISHED:
        return found
    if code == 0:  # the time is over
        return Outcome(STOPPED, found.why)
    ended = f"train.py ended with code {code}"
    if code < 0:
        ended = f"train.py was killed by {signal.Signals(-code).name}"
        ended += ", perhaps for lack of memory" * (-code == signal.SIGKILL)
    # Another process may have been quicker to claim the folder.
    return in_progress(folder) or Outcome(FAILED, line or ended)


def in_progress(folder: Path) -> Outcome | None:
    """Of a run that another process trains, that it is left to it."""
    holder = run_folder.holder(folder)
    return None if holder is None else Outcome(SKIPPED, f"in progress in {holder}")


def _unfinished(folder: Path) -> Outcome:
    begun = (run_folder.METRICS, run_folder.LAST, run_folder.PREVIOUS)
    if not any((folder / name).exists() for name in begun):
        return Outcome(NOT_STARTED)
    try:
        epochs = len(run_folder.read_metrics(folder))
    except FileNotFoundError:
        epochs = 0
    planned = (run_folder.read_settings(folder) or {}).get("epochs")
    of = f" of {planned}" if isinstance(planned, int) else ""
    return Outcome(STOPPED, f"{epochs}{of} epochs")


def _nonfinite(result: Result) -> str | None:
    """The first number of a run that is not finite, in words."""
    summary, rows = result
    for row in rows:
        if fault := nonfinite(row):
            return f"{fault} at epoch {row['epoch']:g}"
    fault = nonfinite(summary)
    return f"{fault} in {run_folder.SUMMARY}" if fault else None


def table(rows: list[tuple[str, Outcome]], noun: str, again: str) -> list[str]:
    """Each run's name and outcome, and the counts; ``again`` is the command for what is missing."""
    width = max(len(name) for name, _ in rows)
    kinds = [outcome.kind for _, outcome in rows]
    counts = [f"{kinds.count(kind)} {kind}" for kind in ALL if kind in kinds]
    total = f"{len(rows)} {noun}{'s' if len(rows) > 1 else ''}: {', '.join(counts)}"
    if not set(kinds).isdisjoint(WILL_RESUME):
        total += f"; {again} trains what is missing"
    return [*(f"{name:<{width}}  {outcome}" for name, outcome in rows), total]


def exit_code(kinds: set[str], error: BaseException | None = None) -> int:
    """0 if all runs have a result or may have one yet, 1 if one has none, 2 if all were refused.

    Or that of ``error``, which has ended them all, where it is an exit or Ctrl-C; the argument of a
    KeyboardInterrupt, if it has one, is its code.
    """
    code = 2 if kinds == {REFUSED} else int(not kinds.isdisjoint(BAD))
    if isinstance(error, SystemExit):
        return int(error.code or 0) or code
    if isinstance(error, KeyboardInterrupt):
        return int(error.args[0]) if error.args else 130
    return code
