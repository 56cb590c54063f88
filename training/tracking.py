"""Log runs to Weights & Biases, without ever blocking or failing a run."""

import importlib
import logging
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from training.console import first_line
from training.variants import (
    HYDRAS,
    NAME_LENGTH,
    option_name,
    result_settings,
    variant_label,
    within_length,
)

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

# The most seconds a run ever waits for wandb: to start, after which the run is kept on disk
# instead; to log, since after a first error nothing more is sent; and to close, when pictures and
# files are uploaded.
INIT_TIMEOUT = 20
LOG_TIMEOUT = 5
CLOSE_TIMEOUT = 30

# Seconds after which logged data is on disk, where it survives the death of wandb's process.
FLUSH_INTERVAL = 1.0

# Seconds that wandb needs beyond its own limit, to start its process and to stop waiting for it.
_MARGIN = 10

# This module reports on wandb, so wandb is silent. Its own error reports would go to the same
# server, complain if that fails, and delay the end of the process.
QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

# Environment variables for a single run, set by an agent for example. If a process starts several
# runs, they must not share them.
WANDB_RUN_VARS = (
    "WANDB_RUN_ID",
    "WANDB_RESUME",
    "WANDB_NAME",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)

# The values of WANDB_MODE, and wandb's former names of two of them.
MODES = ("online", "offline", "disabled")
FORMER_MODES = {"run": "online", "dryrun": "offline"}

# The maximum length of a tag or a job type on wandb's server.
TAG_LENGTH = 64

# Prefixes of the names of settings that rarely differ between runs; the dashboard shows them only
# if they are given on the command line.
DETAILS = (
    *(f"attention.{name}" for name in ("backend", "bias", "blocks", "init")),
    *("channels_last", "compile", "data.name", "data.max_pixels", "data.skip_damaged"),
    *("deterministic", "freeze", "grad_accum", "init_from", "model.", "precision"),
    "sync_batchnorm",
)

# The metric for the loss within an epoch.
STEP_LOSS = "train/step_loss"

# Exit codes that tell the dashboard how a run ended; any other code means "failed".
FINISHED, FAILED, KILLED = 0, 1, 255


class Picture(NamedTuple):
    """A picture and its caption."""

    image: "Image"
    caption: str = ""


class Table(NamedTuple):
    """A table whose cells are numbers, texts or pictures."""

    columns: list[str]
    rows: list[list[Any]]


class Preset(NamedTuple):
    """One of wandb's own charts; its fields are columns of a table."""

    name: str
    fields: dict[str, str]
    title: str


Media = Picture | list[Picture] | Table

# The charts drawn from tables of a finished run, by their names.
CHARTS = {
    "media/classes": Preset(
        "wandb/bar/v0",
        {"label": "class", "value": "top-1 %"},
        "Top-1 accuracy of each class (%)",
    ),
    "media/confusion_matrix": Preset(
        "wandb/confusion_matrix/v1",
        {"Actual": "class", "Predicted": "predicted as", "nPredictions": "images"},
        "Images of each class by what they are predicted as",
    ),
}


def chart_table(name: str) -> str:
    """Return the name of the table behind the chart ``name`` in wandb."""
    return f"{name}_table"


def under_agent() -> bool:
    """Whether the agent of a wandb sweep started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def agent_parameters() -> set[str] | None:
    """Return the names of the settings that the agent's sweep sets; None if they are unknown."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    try:
        found = yaml.safe_load(Path(path).read_text()) if path and under_agent() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return set(found) if isinstance(found, dict) else None


class Tracker:
    """Sends rows to one wandb run. After the first error, it warns once and sends nothing more."""

    def __init__(self, run: Any | None, run_id: str | None, record: str) -> None:
        self._run = run
        self._record = record
        self._exit_code = FINISHED
        # A resumed run continues under this ID. It is kept after an error, and if the run could not
        # be tracked.
        self.id: str | None = run.id if run is not None else run_id

    @property
    def active(self) -> bool:
        """Whether anything is still sent; if not, callers can skip costly pictures."""
        return self._run is not None

    def log(self, row: dict[str, Any], media: dict[str, Media] | None = None) -> None:
        """Send a row for the step ``row["step"]``, with pictures and tables.

        Skip steps that the dashboard already has, sent before a kill but after the last checkpoint.
        """
        if row["step"] < getattr(self._run, "starting_step", 0):
            return
        self._guarded(
            LOG_TIMEOUT,
            # Without commit, wandb would send it only with the next row.
            lambda run: run.log(row | _convert(media or {}), step=row["step"], commit=True),
        )

    def summarize(self, values: dict[str, Any]) -> None:
        """Set values in the run's summary."""
        self._guarded(LOG_TIMEOUT, lambda run: run.summary.update(values))

    def show(self, media: dict[str, Media]) -> None:
        """Put pictures and tables of the whole run, with all of `CHARTS`, into its summary."""

        def send(run: Any) -> None:
            values = _convert(media)
            panels = {}
            for name, (preset, fields, title) in CHARTS.items():
                table = values[chart_table(name)] = values.pop(name)
                chart = _wandb().plot_table(preset, table, fields, {"title": title})
                chart.set_key(name)
                panels[name] = chart.spec.config_value
            # run.log would do this for a chart; updating the summary does not.
            run.config.update({"_wandb": {"visualize": panels}}, allow_val_change=True)
            run.summary.update(values)

        self._guarded(CLOSE_TIMEOUT, send)

    def post(self, media: dict[str, Media]) -> None:
        """Add an entry to the history with pictures and tables of several runs."""
        self._guarded(CLOSE_TIMEOUT, lambda run: run.log(_convert(media), commit=True))

    def artifact(self, name: str, kind: str, files: Sequence[Path], facts: dict[str, Any]) -> None:
        """Upload ``files`` as an artifact of the type ``kind``.

        Characters that are not allowed in ``name`` become dashes.
        """

        def add(run: Any) -> None:
            allowed = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
            artifact = _wandb().Artifact(within_length(allowed, NAME_LENGTH), kind, metadata=facts)
            for file in files:
                artifact.add_file(str(file))
            run.log_artifact(artifact)

        self._guarded(CLOSE_TIMEOUT, add)

    def keep(self, name: str, content: bytes) -> None:
        """Upload a file with this ``name`` and ``content`` to the run."""

        def save(run: Any) -> None:
            file = Path(run.dir, name)
            file.write_bytes(content)
            run.save(str(file), base_path=run.dir, policy="now")

        self._guarded(LOG_TIMEOUT, save)

    def stopped(self, why: str | None, *, continued: bool) -> None:
        """Mark the run as stopped before its last epoch.

        If it will be ``continued``, mark it as preempted, so that a wandb sweep assigns it again.
        """
        self._exit_code = FAILED if continued else KILLED
        self._ended("stopped", why or "")
        if continued:
            self._guarded(LOG_TIMEOUT, lambda run: run.mark_preempting())

    def failed(self, error: BaseException) -> None:
        """Mark the run as ended without a result."""
        self._exit_code = FAILED
        diverged = isinstance(error, FloatingPointError)
        self._ended("diverged" if diverged else "failed", first_line(error))

    def _ended(self, outcome: str, why: str) -> None:
        """Set the outcome in the summary, in the terms of `training.outcome`."""
        self.summarize({"outcome": outcome, "reason": why})

    def close(self) -> None:
        """Finish the run, so that this process can start another one."""
        if self._exit_code == FINISHED:
            self._ended("done", "")
        self._guarded(CLOSE_TIMEOUT, lambda run: run.finish(exit_code=self._exit_code))

    def _guarded(self, seconds: float, act: Callable[[Any], Any]) -> None:
        run = self._run
        if run is None:
            return
        try:
            with_timeout(seconds, lambda: act(run))
        except (Exception, SystemExit) as error:  # SystemExit if wandb's own process has died
            self._run = None
            kept = _kept(run)
            _kill_service()
            rescue = f"; {_sync(kept)} uploads what was logged so far" if kept is not None else ""
            log.warning(
                "wandb logging stopped: %s; %s is complete%s",
                first_line(error),
                self._record,
                rescue,
            )


def _kept(run: Any) -> Path | None:
    """Return the folder where wandb keeps the run on disk, whether it is uploaded or not."""
    try:
        folder = Path(run.settings.sync_dir)
        return folder if folder.is_dir() else None
    except (AttributeError, TypeError):
        return None


def _sync(folder: Path) -> str:
    """Return the command that uploads a run's folder; by default it skips runs sent in part."""
    online = "" if folder.name.startswith("offline-") else "--no-skip-online "
    return f"`wandb sync {online}{shlex.quote(str(folder))}`"


def _convert(it: Any) -> Any:
    """Convert pictures and tables to wandb's types, also within dicts and lists."""
    if isinstance(it, Picture):
        return _wandb().Image(it.image, caption=it.caption)
    if isinstance(it, Table):
        return _wandb().Table(it.columns, _convert(it.rows))
    if isinstance(it, dict):
        return {name: _convert(one) for name, one in it.items()}
    return [_convert(one) for one in it] if isinstance(it, list) else it


def _wandb() -> Any:
    """Import wandb, which only tracked runs need."""
    return importlib.import_module("wandb")


# ---- The config of a run on the dashboard -------------------------------------------------------


def dashboard_config(
    config: dict[str, Any],
    facts: dict[str, Any],
    segment: dict[str, Any],
    given: Iterable[str] = (),
) -> dict[str, Any]:
    """Return what distinguishes a run from others, with flat dotted keys and without Hydra's keys.

    These are the settings that affect its result, without those `DETAILS` that are not ``given``,
    and a few facts. The option of a group is a key of its own, ``attention`` next to
    ``attention.dk``, since a wandb sweep sets and locks these keys. wandb does not distinguish 1.0
    from 1, so ``attention.dk_unit`` says whether dk is a fraction or a number of channels.
    """
    settings = result_settings(config)
    flat = {
        key: value
        for key, value in settings.items()
        if key.rpartition(".")[2] not in HYDRAS and (key in given or not key.startswith(DETAILS))
    }
    flat |= {group: option_name(group, config[group]) for group in ("optim", "schedule")}
    flat |= {name: facts[name] for name in ("model", "attention", "data")}
    for name in ("dk", "dv"):
        if name in config["attention"]:
            whole = isinstance(config["attention"][name], int)
            flat[f"attention.{name}_unit"] = "channels" if whole else "fraction"
    flat |= {"data.evaluated_on": facts["evaluated_on"], "data.digest": facts["data_digest"]}
    flat |= {f"network.{name}": facts[name] for name in ("parameters", "flops")}
    flat |= {f"env.{k}": segment[k] for k in ("commit", "hardware", "precision", "processes")}
    flat |= {f"env.{k}": segment["versions"].get(k) for k in ("python", "torch")}
    return flat | {"variant": variant_label(config, facts["model"], facts["attention"])}


# ---- Calling wandb with a timeout, and starting a run -------------------------------------------


def with_timeout(seconds: float, act: Callable[[], Any]) -> Any:
    """Return or raise what ``act()`` does, but wait at most ``seconds`` for it.

    Raises:
        TimeoutError: if it takes longer. It then continues in a daemon thread.
    """
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(act())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True, name="wandb within a limit").start()
    if not wait([outcome], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome.result()


def _kill_service() -> None:
    """Kill wandb's service process, dead or hanging, so that the next run starts a new one.

    Otherwise the next `wandb.init` would talk to it, and this process would wait for it on exit. Or
    the service would outlive this process, retrying a dead server, and a reader of their common
    output would wait for it to end.
    """
    with suppress(Exception, SystemExit):
        with_timeout(1, _wandb().teardown)
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        for pid in _services():
            with suppress(OSError):
                os.kill(pid, number)
        end = time.monotonic() + 2
        while _services() and time.monotonic() < end:
            time.sleep(0.05)


def _services() -> list[int]:
    """Return the PIDs of this process's running wandb services; empty without /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):  # the process may end meanwhile
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if name == "wandb-core" and int(parent) == os.getpid() and state != "Z":
                found.append(int(stat.parent.name))
    return found


@contextmanager
def track(
    mode: str,
    *,
    folder: Path,
    group: str,
    name: str,
    job_type: str,
    tags: Sequence[str],
    run_id: str | None,
    rows: Sequence[dict[str, Any]] = (),
    record: str = "metrics.csv",
    **others: Any,
) -> Iterator[Tracker]:
    """Yield a `Tracker` of one run, and close it at the end of the ``with``.

    The ``mode`` "auto" means that of WANDB_MODE if set, else online if there are credentials and
    offline if not; it never prompts for any. If the server cannot be reached, the run is kept
    offline. All runs share ``folder``/wandb. ``rows`` are those logged before, in order;
    ``record`` names the file that has all data even if the dashboard does not. The rest is for
    `wandb.init`; group, name, job_type and tags are shortened to fit. No error of wandb is raised,
    not even if it is not installed.
    """
    os.environ.update(QUIET)
    mode = _resolve(mode)
    run = None
    if mode != "disabled":
        run = _start(
            mode,
            record,
            dir=str(folder),
            group=within_length(group, NAME_LENGTH),
            name=within_length(name, NAME_LENGTH),
            job_type=within_length(job_type, TAG_LENGTH),
            tags=list(dict.fromkeys(within_length(tag, TAG_LENGTH) for tag in tags)),
            id=run_id,
            resume="allow" if run_id or os.environ.get("WANDB_RUN_ID") else None,
            **others,
        )
    tracker = Tracker(run, run_id, record)
    if getattr(run, "resumed", False):  # clear the previous outcome
        tracker.summarize({"outcome": "", "reason": ""})
    # A killed run may not have sent all that it logged. Offline, each start of a run is stored
    # separately, and this makes the last one complete.
    for row in rows:
        tracker.log(row)
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit) as error:
        tracker.stopped(type(error).__name__, continued=False)
        raise
    except BaseException as error:
        tracker.failed(error)
        raise
    finally:
        tracker.close()


def _resolve(mode: str) -> str:
    if mode != "auto":
        return mode
    given = os.environ.get("WANDB_MODE", "")
    wanted = FORMER_MODES.get(given.lower(), given.lower())
    if wanted in MODES:
        return wanted
    if given:  # offline: do not upload what the user may have wanted to keep local
        log.warning("WANDB_MODE=%s is not one of %s; using offline", given, ", ".join(MODES))
        return "offline"
    return "online" if has_credentials() else "offline"


def _start(mode: str, record: str, **arguments: Any) -> Any | None:
    fault = None
    if mode == "online" and not has_credentials():
        fault, mode = "no credentials for wandb.mode=online (run `wandb login`)", "offline"
    run = None
    # Give one warning, whatever fails: fall back from the server to the disk, then to CSV only.
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            run = _init(attempt, **arguments)
            break
        except ModuleNotFoundError:
            fault = "not installed (pip install wandb, or set tracking=csv)"
            break
        except (Exception, SystemExit) as error:
            fault = first_line(error)
            _kill_service()
    if run is None:
        log.warning("wandb: %s; this run is only in %s", fault, record)
        return None
    if fault is not None:
        log.warning("wandb: %s; keeping the run on disk instead", fault)
    kept = _kept(run)
    if attempt != "offline":
        log.info("wandb: %s", getattr(run, "url", None))
    elif kept is not None:
        show = shlex.quote(str(kept))
        log.info("wandb: offline; %s uploads the run, `wandb leet %s` shows it", _sync(kept), show)
    return run


def _init(mode: Any, **arguments: Any) -> Any:
    Path(arguments["dir"], "wandb").mkdir(parents=True, exist_ok=True)
    wandb = _wandb()
    # create_new: otherwise a run after one that could not be closed would continue that one.
    settings = wandb.Settings(console="off", init_timeout=INIT_TIMEOUT, reinit="create_new")
    if hasattr(settings, "x_transaction_log_flush_interval"):
        settings.x_transaction_log_flush_interval = FLUSH_INTERVAL

    def begin() -> Any:
        run = wandb.init(mode=mode, settings=settings, **arguments)
        for axis in ("epoch", "step"):
            run.define_metric(axis, hidden=True)  # do not plot an axis against itself
        run.define_metric("*", step_metric="epoch")
        run.define_metric(STEP_LOSS, step_metric="step")
        return run

    return with_timeout(INIT_TIMEOUT + _MARGIN, begin)


def has_credentials() -> bool:
    """Whether wandb has an API key; it is not verified, and the user is not prompted for one."""
    # Without credentials, wandb.init raises, or prompts and waits forever on a terminal. The key is
    # not verified here, which would wait for the network: `_start` does that with a timeout.
    try:
        return bool(_wandb().login(prompt=False, verify=False))
    except (Exception, SystemExit):
        return False
