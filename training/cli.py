"""User mistakes as one line on stderr, whether Hydra finds them or the run does."""

import dataclasses
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from training.distributed import world
from training.files import write_json
from training.hydra_compat import lazy_help_allowed
from training.run_folder import FAILURE

# Read before `run` sets the variable for its own purpose.
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"

# What Hydra itself leaves before a run begins, in its folder and in that of a sweep.
HYDRAS_OWN = {".hydra", "train.log"}
SWEEPS_OWN = {"multirun.yaml"}


@lazy_help_allowed()
def run(main: Callable[[], Any]) -> None:
    """Call a Hydra main function; a mistake in the command line ends it with one line, code 2.

    Ctrl-C ends it with one line too, and code 130. With HYDRA_FULL_ERROR=1 in the environment the
    traceback is shown instead.
    """
    if FULL_ERROR:
        main()
        return
    _check_options()
    # Without this Hydra prints several lines itself; with it, it raises.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        _stop(explain(error))
    except OSError as error:  # Hydra has not been able to make the run's folder
        _stop(f"{_one_line(error)}; set out_dir=... to a folder that can be written")
    except ValueError as error:  # of Hydra's own, which names nothing
        _stop(f"{_one_line(error)} (given: {' '.join(sys.argv[1:])})")
    except KeyboardInterrupt:
        if world().writes:
            _say("interrupted before training began")
        sys.exit(130)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def _check_options() -> None:
    """What Hydra's argparse says of options that do not exist, without its page of usage."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            get_args_parser().parse_args()
    except SystemExit:
        fault = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        _stop(f"{fault}; settings are NAME=VALUE, and options such as -m stand before them")


@contextmanager
def one_line_errors(run_dir: Path, out_dir: Path) -> Iterator[None]:
    """Inside a run: what the user can mend ends it with one line and code 2.

    These are ValueError, OSError, too little memory, a loss that is not finite, and Hydra's own
    errors. A folder in which the run has not yet written anything is removed again, with those
    above it that are then empty, up to ``out_dir``; a loss that is not finite is a result, and
    leaves failed.json there.
    """
    try:
        yield
    except (
        ValueError,
        OSError,
        FloatingPointError,
        HydraException,
        OmegaConfBaseException,
        MemoryError,
        RuntimeError,
    ) as error:
        if isinstance(error, RuntimeError) and not _lacks_memory(error):
            raise
        if world().writes:
            if isinstance(error, FloatingPointError):
                write_json(run_dir / FAILURE, {"error": str(error)})
            _remove_unused(run_dir, out_dir)
        if FULL_ERROR:
            raise
        # Each process tells of another's death: the one that else speaks may be the dead one.
        _stop(explain(error), always=isinstance(error, ConnectionError))


def _stop(line: str, always: bool = False) -> NoReturn:
    if world().writes or always:
        _say(line)
    sys.exit(2)


def _say(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)


def _lacks_memory(error: BaseException) -> bool:
    # On the CPU torch has no class of its own for it.
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def explain(error: BaseException) -> str:
    """The error in one line: the value, and what to change where that is known."""
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:
        return explain(cause)
    if _lacks_memory(error):
        return (
            f"not enough memory ({_one_line(error)}); a smaller batch_size, eval_batch_size, "
            "model or data set, or a larger grad_accum, needs less"
        )
    if isinstance(error, OverrideParseException) and error.override not in str(error):
        return f"{error.override}: {_one_line(error)}"
    settings = cause if isinstance(cause, OmegaConfBaseException) else error
    if isinstance(settings, ConfigKeyError | ConfigAttributeError) and dataclasses.is_dataclass(
        settings.object_type
    ):
        group, _, key = str(settings.full_key).rpartition(".")
        known = [f.name for f in dataclasses.fields(settings.object_type) if f.name[0] != "_"]
        where = f"{group} has" if group else "there are"
        return f"{settings.full_key}: there is no setting {key}; {where} {', '.join(known)}"
    if isinstance(settings, OmegaConfBaseException) and settings.full_key:
        return f"{settings.full_key}: {_one_line(settings)}"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    # Behind these words Hydra and OmegaConf go on about their own insides.
    text = str(error).partition("\n    full_key:")[0].partition("\nConfig search path:")[0]
    return " ".join(text.split())


def _remove_unused(run_dir: Path, out_dir: Path) -> None:
    if not run_dir.is_dir():
        return
    run_dir, out_dir, here = run_dir.resolve(), out_dir.resolve(), Path.cwd()
    for folder in (run_dir, *run_dir.parents):
        own = HYDRAS_OWN if folder == run_dir else SWEEPS_OWN
        left = list(folder.iterdir())
        if {path.name for path in left} - own or (folder == out_dir and not left):
            return
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if folder == out_dir or folder in (here, *here.parents):
            return
        with suppress(OSError):  # it may be a mount, or in a folder that only its owner may change
            folder.rmdir()
