"""Weights & Biases, without ever standing in the way of a run."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb

log = logging.getLogger(__name__)

# The most seconds that a run ever waits for wandb. At the start: until a server that does not
# answer is given up and the run kept on disk instead; after the first fault nothing is sent, and
# so nothing waited for, any more.
INIT_TIMEOUT = 20
LOG_TIMEOUT = 5
CLOSE_TIMEOUT = 30

# What wandb needs in addition to its own limit to start its process, and to let go of it.
_MARGIN = 10

# What is said of wandb is said here. Its reports on its own faults would go to the same server,
# complain when that fails, and be waited for at the end of the process.
_QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


class Tracker:
    """Sends rows to one wandb run. After the first fault it warns once and stays silent."""

    def __init__(self, run: Any | None, run_id: str | None = None) -> None:
        self._run = run
        self._id = run.id if run is not None else run_id

    @property
    def id(self) -> str | None:
        """The run's id, by which a resumed run continues in the same place.

        It outlives a fault, and a run that could not be tracked keeps the one it was given.
        """
        return self._id

    def log(self, row: dict[str, Any]) -> None:
        """One epoch's figures. The epoch is a figure of its own: steps restart when resumed."""
        self._guarded(LOG_TIMEOUT, lambda run: run.log(row))

    def summarize(self, values: dict[str, Any]) -> None:
        """The run's closing figures."""
        self._guarded(LOG_TIMEOUT, lambda run: run.summary.update(values))

    def close(self) -> None:
        """End the run, so that the next one in this process is another."""
        self._guarded(CLOSE_TIMEOUT, lambda run: run.finish())

    def _guarded(self, seconds: float, act: Callable[[Any], Any]) -> None:
        run = self._run
        if run is None:
            return
        try:
            within(seconds, lambda: act(run))
        except Exception as error:
            self._run = None
            _let_go()
            log.warning(
                "wandb: %s; this run is tracked in metrics.csv alone from here", _reason(error)
            )


def within(seconds: float, act: Callable[[], Any]) -> Any:
    """What ``act()`` returns or raises, waited for no longer than so many seconds.

    Raises:
        TimeoutError: it took longer. It then continues in a thread that keeps no process alive.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(act())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True, name="wandb within a limit")
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]


def _let_go() -> None:
    """Forget wandb's process, dead or hanging, so that the next run starts one of its own.

    Otherwise the next `wandb.init` would talk to it, and this process would wait for it at its end.
    """
    # SystemExit is how wandb passes on that its process was killed.
    with suppress(Exception, SystemExit):
        within(1, wandb.teardown)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def track(
    mode: str,
    *,
    folder: Path,
    project: str,
    entity: str | None,
    group: str,
    name: str,
    config: dict[str, Any],
    run_id: str | None,
) -> Iterator[Tracker]:
    """A `Tracker` of one run, closed at the end of the ``with``.

    ``auto`` is what the environment's WANDB_MODE says, else online if credentials are found and
    offline if not; it never asks for any. A server that cannot be reached makes the run an
    offline one. All runs share ``folder``/wandb. No fault of wandb's is passed on.
    """
    os.environ.update(_QUIET)
    mode = _resolve(mode)
    run = None
    if mode != "disabled":
        run = _start(
            mode,
            dir=str(folder),
            project=project,
            entity=entity,
            group=group,
            name=name,
            config=config,
            id=run_id,
            resume="allow" if run_id else None,
        )
    tracker = Tracker(run, run_id)
    try:
        yield tracker
    finally:
        tracker.close()


def _resolve(mode: str) -> str:
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_credentials() else "offline"


def _start(mode: str, **arguments: Any) -> Any | None:
    fault = None
    if mode == "online" and not _has_credentials():
        fault, mode = "no credentials for wandb.mode=online (`wandb login` makes them)", "offline"
    run = None
    # One warning, whatever goes wrong on the way from the server to the disk to the CSV alone.
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            run = _init(attempt, **arguments)
            break
        except Exception as error:
            fault = _reason(error)
            _let_go()
    if run is None:
        log.warning("wandb: %s; this run is tracked in metrics.csv alone", fault)
        return None
    if fault is not None:
        log.warning("wandb: %s; keeping the run on disk instead", fault)
    if attempt == "offline":
        kept = run.settings.sync_dir
        log.info("wandb: kept offline; `wandb sync %s` uploads, `wandb leet %s` shows", kept, kept)
    else:
        log.info("wandb: %s", run.url)
    return run


def _init(mode: Any, **arguments: Any) -> Any:
    Path(arguments["dir"], "wandb").mkdir(parents=True, exist_ok=True)
    # create_new: or a run after one that could not be closed would be taken for that one.
    settings = wandb.Settings(console="off", init_timeout=INIT_TIMEOUT, reinit="create_new")
    return within(
        INIT_TIMEOUT + _MARGIN, lambda: wandb.init(mode=mode, settings=settings, **arguments)
    )


def _has_credentials() -> bool:
    # wandb.init without credentials raises, or on a terminal prompts and waits forever. They are
    # not verified here: that would wait for the network, and `_start` finds out with a limit.
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except Exception:
        return False
