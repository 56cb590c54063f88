"""train.py's command line: user mistakes as one line on stderr, whoever finds them.

Hydra makes folders and writes multirun.yaml before a run begins. What it has made is noted, so that
exactly that is removed again where no run has begun.
"""

import dataclasses
import errno
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

import aaconv
from training import console, run_folder
from training.console import one_line
from training.distributed import world
from training.hydra_compat import lazy_help_allowed
from training.launch import pasteable, quoted
from training.outcome import DIVERGED, FAILED, SKIPPED, STOPPED, JobError
from training.settings import is_text, unknown_setting
from training.tracking import under_agent
from training.variants import name_of_images

# What the user has set HYDRA_FULL_ERROR to, which `run` sets for its own purpose; the processes
# that a launcher starts find the user's value under the other name.
_USERS = "AACONV_FULL_ERROR"
FULL_ERROR = os.environ.get(_USERS, os.environ.get("HYDRA_FULL_ERROR")) == "1"


@lazy_help_allowed()
def run(main: Callable[[], Any]) -> None:
    """Call a Hydra main function; a mistake in the command line ends it with one line, code 2.

    Ctrl-C ends it with one line too, and code 130. With HYDRA_FULL_ERROR=1 in the environment the
    traceback is shown instead.
    """
    console.ready()
    try:
        world()
    except ValueError as error:
        console.stop("train.py", str(error))
    _check_options()
    _Made.by_hydra = _Made()
    run_folder.begun.clear()
    # Without this Hydra prints several lines itself; with it, it raises.
    os.environ |= {"HYDRA_FULL_ERROR": "1", _USERS: str(int(FULL_ERROR))}
    try:
        main()
        _Made.by_hydra = _Made()
    except KeyboardInterrupt:
        stop("interrupted before training began", code=130)
    except Exception as error:
        line = None if FULL_ERROR else _explain_outside_of_a_run(error)
        if line is None:
            raise
        stop(line)
    finally:
        del os.environ["HYDRA_FULL_ERROR"], os.environ[_USERS]
        _Made.by_hydra.remove()


def _explain_outside_of_a_run(error: Exception) -> str | None:
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error)
    if isinstance(error, OSError):  # Hydra was not able to make a folder
        if error.errno == errno.ENAMETOOLONG:
            return f"{one_line(error)}; give a shorter name= or out_dir="
        return f"{one_line(error)}; set out_dir=... to a folder that can be written"
    if isinstance(error, ValueError):  # of Hydra's own, which names nothing
        return f"{one_line(error)} (given: {' '.join(sys.argv[1:])})"
    return None


def _check_options() -> None:
    """What Hydra's argparse says of options that do not exist, without its page of usage."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            get_args_parser().parse_args()
    except SystemExit as stopped:
        if not stopped.code:  # --version
            print(f"train.py {aaconv.__version__}, {_version('hydra-core')}, {_version('torch')}")
            sys.exit(0)
        fault = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        stop(f"{fault}; settings are NAME=VALUE, and options such as -m come before them")


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def run_dir(cfg: DictConfig, output_dir: Path | None = None) -> Path:
    """The folder of the run that Hydra has begun: below the comparison's, unless one was chosen.

    Below it by the overrides that change the result, with a digest where they are too long, and
    then by the seed. A run that an agent of a wandb sweep has started has a folder by the ids that
    wandb gives it: a search may try the same settings twice, and a run that was preempted comes
    back under the same id. ``hydra.run.dir=`` and ``hydra.sweep.subdir=`` choose it themselves.

    ``output_dir`` is Hydra's for the run, by default that of the run it has begun.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir) if output_dir is None else output_dir
    if hydra.mode == RunMode.MULTIRUN:
        shared = hydra.sweep.subdir == "."
    else:
        shared = folder == Path(os.path.abspath(Path(cfg.out_dir, cfg.name)))
    if not shared:
        return folder
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if sweep and run and hydra.mode != RunMode.MULTIRUN:
        return folder / run_folder.folder_name([f"sweep={sweep}"]) / f"run={run}"
    overrides = [hydra.job.override_dirname] if hydra.job.override_dirname else []
    overrides += name_of_images(cfg, hydra.overrides.task)
    name = run_folder.folder_name(overrides) if overrides else "default"
    return folder / name / f"seed={cfg.seed}"


class HydraFolders(Callback):
    """Notes what Hydra is about to make; ``hydra.callbacks`` in configs/config.yaml names it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Called before Hydra makes ``hydra.run.dir``."""
        _Made.by_hydra.note(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called before Hydra makes ``hydra.sweep.dir`` and writes multirun.yaml there."""
        folder = Path(config.hydra.sweep.dir)
        _Made.by_hydra.note(folder, folder / "multirun.yaml")
        # The runs of other launchers are begun by other processes, of which this one knows nothing.
        _Made.by_hydra.elsewhere = not _launched_here(config.hydra)


class _Made:
    """Folders that were not there, and a file as it was, before Hydra made them."""

    by_hydra: "_Made"

    def __init__(self) -> None:
        self.elsewhere = False
        self._folders: list[Path] = []
        self._file: Path | None = None
        self._before: bytes | None = None

    def note(self, folder: Path, file: Path | None = None) -> None:
        """Remember which of ``folder`` and those above it are absent, and what ``file`` holds."""
        folder = folder.absolute()
        self._folders = [f for f in (folder, *folder.parents) if not f.exists()]
        self._file = file
        with suppress(OSError):
            self._before = file.read_bytes() if file is not None else None

    def remove(self) -> None:
        """If no run has begun, put everything back as it was."""
        if self.elsewhere or run_folder.begun:
            return
        with suppress(OSError):
            if self._file is not None and self._before is not None:
                self._file.write_bytes(self._before)
            elif self._file is not None:
                self._file.unlink(missing_ok=True)
        for folder in self._folders:
            with suppress(OSError):  # not there, or others have put something into it
                folder.rmdir()


_Made.by_hydra = _Made()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Inside a run: what the user can mend ends it with one line and code 2.

    These are ValueError, OSError, too little memory, a number that is not finite, and Hydra's own
    errors. A job of a sweep ends with one line too, whatever is wrong; the sweep goes on.

    Raises:
        JobError: a job of a sweep has no result.
        SystemExit: any other run has none; or a signal, or the end of the time, has ended it.
    """
    try:
        yield
    except SystemExit as stopped:
        # Where each job has a process of its own, the time is over for that one alone.
        if not stopped.code and _in_sweep() and not _launched_here(HydraConfig.get()):
            raise JobError(STOPPED, "the time is over") from None
        raise
    except Exception as error:
        # Each process tells of another's death: the main one may be the dead one.
        dead = isinstance(error, ConnectionError)
        if _in_sweep() and not dead:
            raise _job_error(error) from None
        if FULL_ERROR or not _is_for_the_user(error):
            raise
        # For an agent of a wandb sweep a run that diverged is a result, not a fault of its own.
        diverged = isinstance(error, FloatingPointError | run_folder.DivergedError)
        stop(explain(error), code=0 if diverged and under_agent() else 2, always=dead)


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _launched_here(hydra: Any) -> bool:
    """Whether Hydra trains one job of the sweep after the other, in this process."""
    return "basic_launcher" in hydra.launcher._target_


def _is_for_the_user(error: Exception) -> bool:
    expected = (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException)
    return isinstance(error, expected) or _lacks_memory(error) or _is_compiled_too_often(error)


def _job_error(error: Exception) -> JobError:
    """Tell of a job's error; the sweep's table has it again."""
    why = explain(error)
    if FULL_ERROR or not _is_for_the_user(error):
        traceback.print_exception(error)
        why = f"{type(error).__name__}: {why}"
    if world().is_main:
        console.tell("train.py", f"job #{HydraConfig.get().job.num}: {why}")
    if isinstance(error, FloatingPointError | run_folder.DivergedError):
        return JobError(DIVERGED, why)
    return JobError(SKIPPED if isinstance(error, run_folder.HeldError) else FAILED, why)


def stop(line: str, code: int = 2, always: bool = False) -> NoReturn:
    """End the process with one line on stderr, of several processes only the main one's."""
    if world().is_main or always:
        console.stop("train.py", line, code)
    sys.exit(code)


OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def _lacks_memory(error: BaseException) -> bool:
    # On the CPU, and in CUDA's libraries, torch has no class of its own for it.
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in OUT_OF_MEMORY)


def _is_compiled_too_often(error: BaseException) -> bool:
    # Its class is the compiler's, which takes seconds to import.
    return "fail_on_recompile_limit_hit" in str(error)


def explain(error: BaseException) -> str:
    """The error in one line: the value, and what to change where that is known."""
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:
        return explain(cause)
    if _lacks_memory(error):
        return (
            f"not enough memory ({_first_part(error)}); a smaller batch_size, eval_batch_size, "
            "model or data set, or a larger grad_accum, needs less"
        )
    if _is_compiled_too_often(error):
        return (
            "compile=true, but torch compiles this network again and again, and no more after "
            f"{torch._dynamo.config.recompile_limit} times (TORCH_LOGS=recompiles says why); use "
            "compile=false"
        )
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {_grammar_fault(error)}"
    settings = cause if isinstance(cause, OmegaConfBaseException) else error
    if isinstance(settings, ConfigKeyError | ConfigAttributeError) and dataclasses.is_dataclass(
        settings.object_type
    ):
        group, _, key = str(settings.full_key).rpartition(".")
        return unknown_setting(f"{group}." if group else "", key, settings.object_type)
    if isinstance(settings, MissingMandatoryValue | InterpolationToMissingValueError):
        # Of a setting that refers to one without a value, the message names the latter at its end.
        refers = isinstance(settings, InterpolationToMissingValueError)
        key = _first_part(settings).rpartition(" ")[2] if refers else str(settings.full_key)
        return f"{key} has no value; give {key}=..."
    if isinstance(settings, OmegaConfBaseException) and settings.full_key:
        hint = "; no value is written null" if "Value 'None'" in str(settings) else ""
        return f"{settings.full_key}: {_first_part(settings)}{hint}"
    return _first_part(error)


def _grammar_fault(error: OverrideParseException) -> str:
    """What Hydra's grammar has against a word, and how to quote it where it should be text."""
    fault = " ".join(str(error).partition("\nSee https://")[0].split())
    fault = fault.removeprefix(f"Error parsing override '{error.override}'").strip()
    key, equals, value = str(error.override).partition("=")
    if not equals:
        return "settings are NAME=VALUE"
    word = f"{key}={quoted(value)}"
    if not value or not is_text(key) or not _parses(word):
        return fault
    return f"{fault}; text with such a character is quoted twice: {pasteable(key, value)}"


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _first_part(error: BaseException) -> str:
    # After these words Hydra and OmegaConf tell of their own insides.
    text = str(error).partition("\n    full_key:")[0].partition("\nConfig search path:")[0]
    return " ".join(text.split()) or type(error).__name__
