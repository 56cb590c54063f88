"""Weights & Biases, without ever standing in the way of a run."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb

log = logging.getLogger(__name__)

# Seconds until a server that does not answer is given up and the run kept on disk instead.
INIT_TIMEOUT = 20


class Tracker:
    """Sends rows to one wandb run. After the first failure it warns once and stays silent."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    @property
    def id(self) -> str | None:
        """The run's id, by which a resumed run goes on in the same place."""
        return self._run.id if self._run is not None else None

    def log(self, row: dict[str, Any]) -> None:
        """One epoch's figures. The epoch is a figure of its own: steps restart when resumed."""
        self._guarded(lambda run: run.log(row))

    def summarize(self, values: dict[str, Any]) -> None:
        """The run's closing figures."""
        self._guarded(lambda run: run.summary.update(values))

    def close(self) -> None:
        """End the run, so that the next one in this process is another."""
        self._guarded(lambda run: run.finish())

    def _guarded(self, act: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            log.warning("wandb: %s; this run is tracked in metrics.csv alone from here", error)
            self._run = None


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
    offline one. All runs share ``folder``/wandb.
    """
    mode = _resolve(mode)
    tracker = Tracker(None)
    if mode != "disabled":
        tracker = Tracker(
            _start(
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
        )
    try:
        yield tracker
    finally:
        tracker.close()


def _resolve(mode: str) -> str:
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    try:
        # Not verified here: that would wait for the network. `_start` finds out with a limit.
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except Exception:
        return "offline"


def _start(mode: Any, **arguments: Any) -> Any | None:
    if mode == "online" and not _has_credentials():
        log.warning("wandb: no credentials for wandb.mode=online (`wandb login` makes them)")
        mode = "offline"
    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT)
    try:
        Path(arguments["dir"]).mkdir(parents=True, exist_ok=True)
        run = wandb.init(mode=mode, settings=settings, **arguments)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if mode == "offline":
            log.warning("wandb: %s; this run is tracked in metrics.csv alone", reason)
            return None
        log.warning("wandb: %s; keeping the run on disk instead", reason)
        return _start("offline", **arguments)
    if mode == "offline":
        kept = run.settings.sync_dir
        log.info("wandb: kept offline; `wandb sync %s` uploads, `wandb leet %s` shows", kept, kept)
    else:
        log.info("wandb: %s", run.url)
    return run


def _has_credentials() -> bool:
    # wandb.init without credentials raises, or on a terminal prompts and waits for ever.
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except Exception:
        return False
