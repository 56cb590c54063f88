"""train.py's command line: a run, or the jobs of a sweep; mistakes as one line on stderr.

torch is imported when a run begins: help, the settings and a mistake in them do not need it.
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

# What the user has set HYDRA_FULL_ERROR to, which `run` sets for its own purpose; the processes
# that a launcher starts find the user's value under the other name.
_USERS = "AACONV_FULL_ERROR"
FULL_ERROR = os.environ.get(_USERS, os.environ.get("HYDRA_FULL_ERROR")) == "1"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def _main(cfg: DictConfig) -> float:
    """Train ``cfg`` in its own folder; the last epoch's top-1 accuracy in percent.

    Hydra calls it. A job of a sweep always returns, see `training.sweep.run_job`.
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
    """Do what the command line says; a mistake in it ends the process with one line and code 2.

    Ctrl-C ends it with one line too, and code 130. A sweep ends with the table of its jobs, see
    `training.sweep`. With HYDRA_FULL_ERROR=1 in the environment the traceback is shown instead.
    """
    console.ready()
    # Python 3.14 checks an option's help when the option is added, and takes Hydra 1.3's, which
    # becomes text only when it is printed, for a fault.
    if hasattr(argparse._ActionsContainer, "_check_help"):
        argparse._ActionsContainer._check_help = lambda *_: None
    try:
        world()
    except ValueError as error:
        console.stop("train.py", str(error))
    sys.argv[1:] = [part for word in sys.argv[1:] for part in words.expand(word)]
    _check_options()
    # Without this Hydra prints several lines itself; with it, it raises.
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
    """End the process with one line, where the error is the user's."""
    if isinstance(error, KeyboardInterrupt):
        stop("interrupted before training began", code=130)
    if FULL_ERROR:
        return
    if isinstance(error, HydraException | OmegaConfBaseException):
        stop(explain(error))
    if isinstance(error, OSError):  # Hydra was not able to make a folder
        remedy = "; choose a writable folder with out_dir=..."
        stop(explain(error) + ("" if error.errno == errno.ENAMETOOLONG else remedy))
    # Hydra's own, before a run began, whatever it is: it names nothing.
    code = _main.__wrapped__.__code__
    own = any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, Exception) and not own:
        stop(f"{explain(error)} (given: {without_middle(' '.join(sys.argv[1:]))})")


def _check_options() -> None:
    """What Hydra's argparse says of options that do not exist, without its page of usage."""
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
    """The folder of the run that Hydra has begun: ``run_dir``, or a name below out_dir/name.

    It is named by a config of the user's own and by the overrides that change the result, with a
    digest where they are too long, and below that by the seed. A run that an agent of a wandb sweep
    has started has a folder by the ids that wandb gives it: a search may try the same settings
    twice, and a run that was preempted comes back under the same id. Hydra's own
    ``hydra.run.dir=`` and ``hydra.sweep.subdir=`` are taken where a user gives them.
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
    """Inside a run that is no job of a sweep: a mistake of the user ends it with one line, code 2.

    These are ValueError, OSError, too little memory, a number that is not finite, and Hydra's own
    errors.
    """
    try:
        yield
    except Exception as error:
        if FULL_ERROR or not is_for_the_user(error):
            raise
        from training.run_folder import DivergedError

        # For an agent of a wandb sweep a run that diverged is a result, not a fault of its own.
        diverged = isinstance(error, FloatingPointError | DivergedError)
        # Each process tells of another's death: the main one may be the dead one.
        always = isinstance(error, ConnectionError)
        stop(explain(error), code=0 if diverged and under_agent() else 2, always=always)


def stop(line: str, code: int = 2, always: bool = False) -> NoReturn:
    """End the process with one line on stderr, of several processes only the main one's."""
    if world().is_main or always:
        if REASON in os.environ:
            write_text(Path(os.environ[REASON]), line)
        console.stop("train.py", line, code)
    sys.exit(code)
