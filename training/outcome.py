"""How a run ended, in the same terms for the jobs of a sweep, for compare.py and for the report.

The files in a run's folder take precedence over the exit code of its process.
"""

import signal
from pathlib import Path
from typing import NamedTuple

from models.fields import UnreadableError
from training import run_folder
from training.records import Summary, nonfinite

# summary.json and metrics.csv of a finished run.
Result = tuple[Summary, list[dict[str, float]]]

# The possible outcomes of a run, in the order of the summary line's counts.
DONE, SKIPPED, STOPPED = "done", "skipped", "stopped"
DIVERGED, FAILED, REFUSED, NOT_STARTED = "diverged", "failed", "refused", "not started"
ALL = (DONE, SKIPPED, STOPPED, DIVERGED, FAILED, REFUSED, NOT_STARTED)
# Outcomes without a result.
BAD = (DIVERGED, FAILED, REFUSED)
# Outcomes with epochs left to train.
UNFINISHED = (STOPPED, NOT_STARTED)
# Outcomes that may turn into a result if the same command is run again.
WILL_RESUME = (*UNFINISHED, FAILED)

# Exit codes of a run stopped by SIGINT, SIGUSR1 or SIGTERM: 128 plus the signal's number.
STOP_CODES = (130, 138, 143)


class Outcome(NamedTuple):
    """The outcome of a run, one of `ALL`, and the reason or details."""

    kind: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind


def read(folder: Path) -> tuple[Outcome, Result | None]:
    """Return a run's outcome according to the files in its folder, and its result if `DONE`.

    The outcome is `FAILED` if files are damaged, `NOT_STARTED` if there are none to continue from.
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
    """Return the outcome of a run whose process ended with the exit code ``code``.

    ``found`` is the outcome according to its files, ``line`` its error message.
    """
    if found.kind not in UNFINISHED:
        return found
    if code == 0:  # its time limit was reached
        return Outcome(STOPPED, found.why)
    ended = f"train.py ended with code {code}"
    if code < 0:
        ended = f"train.py was killed by {signal.Signals(-code).name}"
        ended += ", perhaps for lack of memory" * (-code == signal.SIGKILL)
    # Another process may have claimed the folder first.
    return in_progress(folder) or Outcome(FAILED, line or ended)


def in_progress(folder: Path) -> Outcome | None:
    """Return `SKIPPED` if another process is training the run, else None."""
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
    """Describe the first number of a run that is not finite; None if all are."""
    summary, rows = result
    for row in rows:
        if fault := nonfinite(row):
            return f"{fault} at epoch {row['epoch']:g}"
    fault = nonfinite(summary)
    return f"{fault} in {run_folder.SUMMARY}" if fault else None


def table(rows: list[tuple[str, Outcome]], noun: str, again: str) -> list[str]:
    """Return a line per run with its outcome, then the counts; ``again`` trains what is missing."""
    width = max(len(name) for name, _ in rows)
    kinds = [outcome.kind for _, outcome in rows]
    counts = [f"{kinds.count(kind)} {kind}" for kind in ALL if kind in kinds]
    total = f"{len(rows)} {noun}{'s' if len(rows) > 1 else ''}: {', '.join(counts)}"
    if not set(kinds).isdisjoint(WILL_RESUME):
        total += f"; {again} trains what is missing"
    return [*(f"{name:<{width}}  {outcome}" for name, outcome in rows), total]


def exit_code(kinds: set[str], error: BaseException | None = None) -> int:
    """Return 0 if no run is `BAD`, 2 if all were refused, and 1 otherwise.

    If ``error``, which ended all runs, is an exit with a nonzero code, return that code; for a
    KeyboardInterrupt return its argument, or 130 without one.
    """
    code = 2 if kinds == {REFUSED} else int(not kinds.isdisjoint(BAD))
    if isinstance(error, SystemExit):
        return int(error.code or 0) or code
    if isinstance(error, KeyboardInterrupt):
        return int(error.args[0]) if error.args else 130
    return code
