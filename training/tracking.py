"""Weights & Biases, without ever standing in the way of a run."""

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

# The most seconds that a run ever waits for wandb. At the start: until a server that does not
# answer is given up and the run kept on disk instead; after the first fault nothing is sent, and
# so nothing waited for, any more. At the end pictures and files are uploaded.
INIT_TIMEOUT = 20
LOG_TIMEOUT = 5
CLOSE_TIMEOUT = 30

# Seconds after which what was logged is on disk, and so outlives wandb's process.
FLUSH_INTERVAL = 1.0

# What wandb needs in addition to its own limit to start its process, and to let go of it.
_MARGIN = 10

# What is said of wandb is said here. Its reports on its own faults would go to the same server,
# complain when that fails, and be waited for at the end of the process.
QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

# What the environment says of one run, an agent's for example. Several runs that are started from
# there must not share it.
WANDB_RUN_VARS = (
    "WANDB_RUN_ID",
    "WANDB_RESUME",
    "WANDB_NAME",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)

# What WANDB_MODE may be, and what wandb called two of them before.
MODES = ("online", "offline", "disabled")
FORMER_MODES = {"run": "online", "dryrun": "offline"}

# The longest tag or job type that wandb's server takes.
TAG_LENGTH = 64

# Settings, by how their names begin, that few runs differ in; the dashboard has those that are
# given.
DETAILS = (
    *(f"attention.{name}" for name in ("backend", "bias", "blocks", "init")),
    *("channels_last", "compile", "data.name", "data.max_pixels", "data.skip_damaged"),
    *("deterministic", "freeze", "grad_accum", "init_from", "model.", "precision"),
    "sync_batchnorm",
)

# The loss in the course of an epoch.
STEP_LOSS = "train/step_loss"

# Exit codes by which the dashboard tells how a run ended; any other one is "failed".
FINISHED, FAILED, KILLED = 0, 1, 255


class Picture(NamedTuple):
    """A picture and what is said of it."""

    image: "Image"
    caption: str = ""


class Table(NamedTuple):
    """A table whose cells are numbers, texts or pictures."""

    columns: list[str]
    rows: list[list[Any]]


class Preset(NamedTuple):
    """One of wandb's own charts, whose fields are columns of a table."""

    name: str
    fields: dict[str, str]
    title: str


Media = Picture | list[Picture] | Table

# The tables of a finished run that are drawn, by the names under which it has the charts.
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
    """The name under which wandb has the table of the chart ``name``."""
    return f"{name}_table"


def under_agent() -> bool:
    """Whether an agent of a wandb sweep has started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def agent_parameters() -> set[str] | None:
    """The names of the settings that the agent's sweep sets; None where there is no such file."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    try:
        found = yaml.safe_load(Path(path).read_text()) if path and under_agent() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return set(found) if isinstance(found, dict) else None


class Tracker:
    """Sends rows to one wandb run. After the first fault it warns once and stays silent."""

    def __init__(self, run: Any | None, run_id: str | None, record: str) -> None:
        self._run = run
        self._record = record
        self._exit_code = FINISHED
        # By which a resumed run continues in the same place. It outlives a fault, and a run that
        # could not be tracked keeps the one it was given.
        self.id: str | None = run.id if run is not None else run_id

    @property
    def active(self) -> bool:
        """Whether anything is still sent; what would be costly to make need not be, if not."""
        return self._run is not None

    def log(self, row: dict[str, Any], media: dict[str, Media] | None = None) -> None:
        """What is known after ``row["step"]`` steps, and what is to be seen of it.

        Nothing is sent that the run has already: a kill came between that and its checkpoint.
        """
        if row["step"] < getattr(self._run, "starting_step", 0):
            return
        self._guarded(
            LOG_TIMEOUT,
            # Without commit it would be sent with the next row.
            lambda run: run.log(row | _convert(media or {}), step=row["step"], commit=True),
        )

    def summarize(self, values: dict[str, Any]) -> None:
        """The run's closing figures."""
        self._guarded(LOG_TIMEOUT, lambda run: run.summary.update(values))

    def show(self, media: dict[str, Media]) -> None:
        """Put what there is to see of the whole run, all of `CHARTS` too, into its summary."""

        def send(run: Any) -> None:
            values = _convert(media)
            panels = {}
            for name, (preset, fields, title) in CHARTS.items():
                table = values[chart_table(name)] = values.pop(name)
                chart = _wandb().plot_table(preset, table, fields, {"title": title})
                chart.set_key(name)
                panels[name] = chart.spec.config_value
            # Which run.log does for a chart, and the summary does not.
            run.config.update({"_wandb": {"visualize": panels}}, allow_val_change=True)
            run.summary.update(values)

        self._guarded(CLOSE_TIMEOUT, send)

    def post(self, media: dict[str, Media]) -> None:
        """What there is to see of several runs: an entry of its own in the history."""
        self._guarded(CLOSE_TIMEOUT, lambda run: run.log(_convert(media), commit=True))

    def artifact(self, name: str, kind: str, files: Sequence[Path], facts: dict[str, Any]) -> None:
        """Keep ``files`` with the run, under a name of the kind ``kind``.

        What a name cannot have becomes a dash.
        """

        def add(run: Any) -> None:
            allowed = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
            artifact = _wandb().Artifact(within_length(allowed, NAME_LENGTH), kind, metadata=facts)
            for file in files:
                artifact.add_file(str(file))
            run.log_artifact(artifact)

        self._guarded(CLOSE_TIMEOUT, add)

    def keep(self, name: str, content: bytes) -> None:
        """Keep a file of this ``name`` and ``content`` with the run."""

        def save(run: Any) -> None:
            file = Path(run.dir, name)
            file.write_bytes(content)
            run.save(str(file), base_path=run.dir, policy="now")

        self._guarded(LOG_TIMEOUT, save)

    def stopped(self, why: str | None, *, continued: bool) -> None:
        """The run ends before its last epoch; whether somebody is going to continue it by itself.

        Then the dashboard shows it as preempted, and an agent's server gives it out again.
        """
        self._exit_code = FAILED if continued else KILLED
        self._ended("stopped", why or "")
        if continued:
            self._guarded(LOG_TIMEOUT, lambda run: run.mark_preempting())

    def failed(self, error: BaseException) -> None:
        """The run ends without a result."""
        self._exit_code = FAILED
        diverged = isinstance(error, FloatingPointError)
        self._ended("diverged" if diverged else "failed", first_line(error))

    def _ended(self, outcome: str, why: str) -> None:
        """Say in the summary how the run has ended, in the words of `training.outcome`."""
        self.summarize({"outcome": outcome, "reason": why})

    def close(self) -> None:
        """End the run, so that the next one in this process is another."""
        if self._exit_code == FINISHED:
            self._ended("done", "")
        self._guarded(CLOSE_TIMEOUT, lambda run: run.finish(exit_code=self._exit_code))

    def _guarded(self, seconds: float, act: Callable[[Any], Any]) -> None:
        run = self._run
        if run is None:
            return
        try:
            with_timeout(seconds, lambda: act(run))
        except (Exception, SystemExit) as error:  # the second when wandb's own process has died
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
    """The folder in which wandb keeps a run on disk, whether it is sent or not."""
    try:
        folder = Path(run.settings.sync_dir)
        return folder if folder.is_dir() else None
    except (AttributeError, TypeError):
        return None


def _sync(folder: Path) -> str:
    """The command that uploads it; one that was sent in part is passed over by default."""
    online = "" if folder.name.startswith("offline-") else "--no-skip-online "
    return f"`wandb sync {online}{shlex.quote(str(folder))}`"


def _convert(it: Any) -> Any:
    """Pictures and tables as wandb's own, also in dicts and lists; all else stays as it is."""
    if isinstance(it, Picture):
        return _wandb().Image(it.image, caption=it.caption)
    if isinstance(it, Table):
        return _wandb().Table(it.columns, _convert(it.rows))
    if isinstance(it, dict):
        return {name: _convert(one) for name, one in it.items()}
    return [_convert(one) for one in it] if isinstance(it, list) else it


def _wandb() -> Any:
    """The package, which only a run that is tracked needs."""
    return importlib.import_module("wandb")


# ---- What the dashboard is told of a run --------------------------------------------------------


def dashboard_config(
    config: dict[str, Any],
    facts: dict[str, Any],
    segment: dict[str, Any],
    given: Iterable[str] = (),
) -> dict[str, Any]:
    """Of a run what tells it from others, as one level of dotted keys, no word of Hydra's.

    These are the settings that decide its result but for `DETAILS`, what of those is ``given``, and
    a few facts. The groups' options are plain names beside their settings, ``attention`` beside
    ``attention.dk``: what a sweep of wandb sets, it sets under these keys, and locks them. A whole
    float is the same number as an int there, so ``attention.dk_unit`` says which one dk is.
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


# ---- Within a limit of time, and whatever happens -----------------------------------------------


def with_timeout(seconds: float, act: Callable[[], Any]) -> Any:
    """What ``act()`` returns or raises, waited for no longer than so many seconds.

    Raises:
        TimeoutError: it took longer. It then continues in a thread that keeps no process alive.
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
    """Forget wandb's process, dead or hanging, so that the next run starts one of its own.

    Otherwise the next `wandb.init` would talk to it, and this process would wait for it at its end;
    or it would outlive this one, asking a dead server again and again, and whoever reads what the
    two print would wait for that.
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
    """This process's children that are wandb's and still run; none where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):  # it may end meanwhile
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
    """A `Tracker` of one run, closed at the end of the ``with``.

    ``auto`` is what the environment's WANDB_MODE says, else online if credentials are found and
    offline if not; it never asks for any. A server that cannot be reached makes the run an
    offline one. All runs share ``folder``/wandb. ``rows`` are what was logged already, in order;
    ``record`` names the file that has everything even where the dashboard has not. The rest is for
    `wandb.init`; group, name, job_type, and tags are made to fit. No fault of wandb's is passed on,
    not even that it is not installed.
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
    if getattr(run, "resumed", False):  # how it ended before is past
        tracker.summarize({"outcome": "", "reason": ""})
    # A run that was killed may not have sent all it had logged; offline each start of a run is kept
    # apart, and the last one is then whole.
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
    if given:  # not a reason to upload what was perhaps to stay here
        log.warning("WANDB_MODE=%s is none of %s; taken as offline", given, ", ".join(MODES))
        return "offline"
    return "online" if has_credentials() else "offline"


def _start(mode: str, record: str, **arguments: Any) -> Any | None:
    fault = None
    if mode == "online" and not has_credentials():
        fault, mode = "no credentials for wandb.mode=online (run `wandb login`)", "offline"
    run = None
    # One warning, whatever goes wrong on the way from the server to the disk to the CSV alone.
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
    # create_new: or a run after one that could not be closed would be taken for that one.
    settings = wandb.Settings(console="off", init_timeout=INIT_TIMEOUT, reinit="create_new")
    if hasattr(settings, "x_transaction_log_flush_interval"):
        settings.x_transaction_log_flush_interval = FLUSH_INTERVAL

    def begin() -> Any:
        run = wandb.init(mode=mode, settings=settings, **arguments)
        for axis in ("epoch", "step"):
            run.define_metric(axis, hidden=True)  # no chart of an axis against itself
        run.define_metric("*", step_metric="epoch")
        run.define_metric(STEP_LOSS, step_metric="step")
        return run

    return with_timeout(INIT_TIMEOUT + _MARGIN, begin)


def has_credentials() -> bool:
    """Whether wandb has a key to log in with; it is not verified, and nobody is asked."""
    # wandb.init without credentials raises, or on a terminal prompts and waits forever. They are
    # not verified here: that would wait for the network, and `_start` finds out with a limit.
    try:
        return bool(_wandb().login(prompt=False, verify=False))
    except (Exception, SystemExit):
        return False
