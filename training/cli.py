"""train.py's command line: start a run or a sweep, and report user errors in one line on stderr.

torch is imported only when a run begins: --help, --cfg and mistakes in settings do not need it.
"""

import argparse
import errno
import importlib
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from training import console, sweep, words
from training.compose import CONFIGS
from training.errors import explain, is_for_the_user, without_middle
from training.files import write_text
from training.launch import REASON
from training.tracking import under_agent
from training.variants import folder_name, naming_words
from training.world import world

# `run` overrides HYDRA_FULL_ERROR, so the user's value is kept under a second name, where the
# processes started by a launcher find it.
_USERS = "AACONV_FULL_ERROR"
FULL_ERROR = os.environ.get(_USERS, os.environ.get("HYDRA_FULL_ERROR")) == "1"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def _main(cfg: DictConfig) -> float:
    """Train ``cfg`` in its own folder and return the last epoch's top-1 accuracy in percent.

    Called by Hydra. For the jobs of a sweep, see `training.sweep.run_job`.
    """
    train = importlib.import_module("train").train
    from training.distributed import process_group
    from training.run_folder import top1

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.run_job(train, cfg, run_dir, full_error=FULL_ERROR)
    with one_line_errors():
        folder = run_dir(cfg)
        with sweep.reason_kept(cfg, folder), process_group(compiles=cfg.compile):
            return top1(train(cfg, folder))


def run() -> None:
    """Run the command line; a mistake in it ends the process with one line and exit code 2.

    Ctrl-C ends the process with one line and exit code 130. A sweep ends with a table of its jobs,
    see `training.sweep`. With HYDRA_FULL_ERROR=1 in the environment, tracebacks are shown instead.
    """
    console.ready()
    # Python 3.14 checks an option's help when the option is added, and rejects Hydra 1.3's, which
    # becomes text only when it is printed.
    if hasattr(argparse._ActionsContainer, "_check_help"):
        argparse._ActionsContainer._check_help = lambda *_: None
    try:
        world()
    except ValueError as error:
        console.stop("train.py", str(error))
    sys.argv[1:] = [part for word in sys.argv[1:] for part in words.expand(word)]
    _check_options()
    # Without this, Hydra prints errors itself, in several lines; with it, Hydra raises them.
    os.environ |= {"HYDRA_FULL_ERROR": "1", _USERS: str(int(FULL_ERROR))}
    try:
        _main()
        code = sweep.end(None)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        code = sweep.end(error)
        if code is None:
            _stop_at(error)
            raise
    finally:
        del os.environ["HYDRA_FULL_ERROR"], os.environ[_USERS]
    if code:
        sys.exit(code)


def _stop_at(error: BaseException) -> None:
    """End the process with one line if the user caused the error; otherwise do nothing."""
    if isinstance(error, KeyboardInterrupt):
        stop("interrupted before training began", code=130)
    if FULL_ERROR:
        return
    if isinstance(error, HydraException | OmegaConfBaseException):
        stop(explain(error))
    if isinstance(error, OSError):  # Hydra could not create a folder
        remedy = "; choose a writable folder with out_dir=..."
        stop(explain(error) + ("" if error.errno == errno.ENAMETOOLONG else remedy))
    # Any error of Hydra's own before the run began: its message may not say what it is about.
    code = _main.__wrapped__.__code__
    own = any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, Exception) and not own:
        stop(f"{explain(error)} (given: {without_middle(' '.join(sys.argv[1:]))})")


def _check_options() -> None:
    """Handle --version; report bad options and settings in one line, without argparse's usage."""
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            options = get_args_parser().parse_args()
    except SystemExit as stopped:
        if not stopped.code:  # --version
            own = importlib.import_module("aaconv").__version__
            hydra_version, torch_version = map(importlib.metadata.version, ("hydra-core", "torch"))
            print(f"train.py {own}, hydra-core {hydra_version}, torch {torch_version}")
            sys.exit(0)
        fault = stderr.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        stop(f"{fault}; settings are NAME=VALUE, and options such as -m come before them")
    line = words.fault(options.overrides) or words.config_fault(
        options.config_name, options.config_dir, options.config_path
    )
    if line is not None:
        stop(line)


def run_dir(cfg: DictConfig) -> Path:
    """Return the folder of the current Hydra run: ``run_dir`` if set, else one below out_dir/name.

    Its name has the user's own primary config, if any, and the overrides that change the result,
    with a digest if they are too long; the seed is a subfolder. A run started by the agent of a
    wandb sweep gets a folder named by wandb's ids instead: a search may try the same settings
    twice, and a preempted run comes back under the same id. If the user sets ``hydra.run.dir=`` or
    ``hydra.sweep.subdir=``, that folder is used.
    """
    if cfg.run_dir is not None:
        return Path(os.path.expanduser(cfg.run_dir)).absolute()
    hydra = HydraConfig.get()
    own, multirun = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    out_dir = Path(os.path.abspath(os.path.expanduser(cfg.out_dir)))
    if hydra.sweep.subdir != "." if multirun else own != out_dir:
        return own
    folder = own if multirun else own / cfg.name
    sweep_id, run_id = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if sweep_id and run_id and not multirun:
        return folder / folder_name([f"sweep={sweep_id}"]) / f"run={run_id}"
    own_config = hydra.job.config_name not in (None, "config")
    first = [f"config={hydra.job.config_name}"] if own_config else []
    name = folder_name([*first, *naming_words(cfg, sorted(hydra.overrides.task))])
    return folder / name / f"seed={cfg.seed}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a run outside a sweep with one line and exit code 2 if the user can fix the error.

    These are ValueError, OSError, out of memory, non-finite losses or scores, and Hydra's errors.
    """
    try:
        yield
    except Exception as error:
        if FULL_ERROR or not is_for_the_user(error):
            raise
        from training.run_folder import DivergedError

        # To the agent of a wandb sweep, a diverged run is a result, not a failure.
        diverged = isinstance(error, FloatingPointError | DivergedError)
        # Every process reports another's death: the dead one may be the main process.
        always = isinstance(error, ConnectionError)
        stop(explain(error), code=0 if diverged and under_agent() else 2, always=always)


def stop(line: str, code: int = 2, always: bool = False) -> NoReturn:
    """End the process; the main process, or with ``always`` each one, prints a line on stderr."""
    if world().is_main or always:
        if REASON in os.environ:
            write_text(Path(os.environ[REASON]), line)
        console.stop("train.py", line, code)
    sys.exit(code)
