"""When a run saves a checkpoint, and when it stops: on a signal or at its time limit."""

import enum
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from training import console, distributed
from training.tracking import under_agent

log = logging.getLogger(__name__)
Item = TypeVar("Item")

# Seconds within which torchrun passes on a signal that the terminal has sent to all processes.
ECHO_TIMEOUT_S = 2.0

# Windows has no SIGUSR1.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


def _process_age() -> float:
    """Return the seconds since this process started; 0 if the system does not report it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


# When the process, not the run, started: a queue's limit includes the slow import of torch.
BEGUN = time.monotonic() - _process_age()


class Action(enum.IntEnum):
    """What a run does next. With several processes, all do the greatest of their actions."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2  # after saving


class Stop:
    """Decides after each step and each epoch what a run does next, and knows why it stops.

    Within the ``with``, SIGTERM, SIGINT and SIGUSR1 are recorded instead of ending the process; a
    SIGINT after any of them ends it at once, with code 130. Signals that were ignored stay ignored,
    and outside the main thread, where Python allows no handlers, signals are not handled here.
    ``max_minutes`` counts from the start of the process. A process ``launched`` by torchrun gets
    the terminal's SIGINT twice, directly and through torchrun: the second one is ignored.

    A checkpoint is due ``checkpoint_minutes`` after the last one; if None, after each epoch.
    """

    def __init__(
        self,
        max_minutes: float | None,
        launched: bool = False,
        checkpoint_minutes: float | None = None,
    ) -> None:
        self.signal: signal.Signals | None = None
        self._echo_until = -math.inf
        self._launched = launched
        self._max_minutes = math.inf if max_minutes is None else max_minutes
        self._before: dict[signal.Signals, Any] = {}
        self._checkpoint_minutes = checkpoint_minutes
        self._saved_at = time.monotonic()
        self._has_saved = False
        self._is_over = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._remember) for number in heeded}
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None and self._launched:
            # After a death, torchrun sends SIGTERM: keep handling it until the error is reported.
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None and number == signal.SIGINT and now > self._echo_until:
            os._exit(128 + number)
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        if self._launched:
            self._echo_until = now + ECHO_TIMEOUT_S
        # Not with print or a logger: the signal may have interrupted one of them.
        console.write_stderr(
            f"{self.signal.name}: saving after this step; press Ctrl-C again to exit at once\n"
        )

    def why(self) -> str | None:
        """Return the reason to stop: a signal's name, or the time limit; None if there is none."""
        if self.signal is not None:
            return self.signal.name
        if self._is_over or time.monotonic() - BEGUN >= 60 * self._max_minutes:
            return f"max_minutes={self._max_minutes:g}"
        return None

    def after_step(self) -> Action:
        """Return what to do after a step; the same in all processes."""
        return self._next(self._minutes_since_saved() >= (self._checkpoint_minutes or math.inf))

    def after_epoch(self, last: bool) -> Action:
        """Return what to do after an epoch, perhaps the ``last`` one; the same in all processes.

        The first epoch that a process finishes is always saved: so metrics.csv never exists without
        a checkpoint, and a run that is killed again and again still makes progress.
        """
        due = self._minutes_since_saved() >= (self._checkpoint_minutes or 0)
        return self._next(due or last or not self._has_saved)

    def saved(self) -> None:
        """Record that a checkpoint has just been written."""
        self._saved_at, self._has_saved = time.monotonic(), True

    def _minutes_since_saved(self) -> float:
        return (time.monotonic() - self._saved_at) / 60

    def _next(self, save: bool) -> Action:
        own = Action.SAVE if save else Action.CONTINUE
        action = Action(distributed.all_reduce_max(own if self.why() is None else Action.STOP))
        if action is Action.STOP:  # perhaps due to a signal or the time limit in another process
            self._is_over = not self.any_signal()
            if self._is_over:  # a signal that arrived since is too late, in all processes
                self.signal = None
        return action

    def any_signal(self) -> bool:
        """Whether any process has received a signal; all processes then adopt it."""
        number = distributed.all_reduce_max(self.signal or 0)
        if number:  # if 0, keep a signal that this process has received meanwhile
            self.signal = signal.Signals(number)
        return bool(number)

    @property
    def will_resume(self) -> bool:
        """Whether the run will be continued: requeued after SIGUSR1, or after ``max_minutes``."""
        return self.signal is None or self.signal.name == "SIGUSR1"

    def until_signalled(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield ``items``, at least one, until a signal arrives.

        The time limit does not apply: an evaluation longer than the limit would never finish.
        """
        for item in items:
            yield item
            if self.signal is not None:
                return

    def leave(self, finished: bool) -> None:
        """End the process if a signal arrived or the run is not finished; otherwise do nothing.

        A signal also ends the other runs of a sweep, whether this one is finished or not. The exit
        code is 128 plus the signal's number, as in shells, or 0 at the time limit. After SIGUSR1,
        Slurm requeues the job. The agent of a wandb sweep stops runs by SIGTERM or SIGINT when the
        sweep says so, and would count any code other than 0 as a failure.
        """
        if self.signal is not None and self.signal.name == "SIGUSR1":
            _requeue()
        if self.signal is not None:
            asked_for = under_agent() and not self.will_resume
            sys.exit(0 if asked_for else 128 + self.signal)
        if not finished:
            sys.exit(0)


def _requeue() -> None:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        log.warning("SIGUSR1 asks for the job to be requeued, but this is not a Slurm job")
        return
    try:
        subprocess.run(
            ["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        log.warning("job %s was not requeued (%s); run `scontrol requeue %s`", job, said, job)
