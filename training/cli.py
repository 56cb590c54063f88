"""User mistakes as one line on stderr, whether Hydra finds them or the run does."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from training.distributed import world
from training.files import FAILED, write_json

# Read before `run` sets the variable for its own purpose.
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"

# What Hydra itself leaves in a run's folder before the run begins.
HYDRAS_OWN = {".hydra", "train.log"}


def run(main: Callable[[], Any]) -> None:
    """Call a Hydra main function; a mistake in the command line ends it with one line, code 2.

    Ctrl-C ends it with one line too, and code 130. With HYDRA_FULL_ERROR=1 in the environment the
    traceback is shown instead.
    """
    if FULL_ERROR:
        main()
        return
    # Without this Hydra prints several lines itself; with it, it raises.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        _stop(error)
    except KeyboardInterrupt:
        if world().writes:
            _say("interrupted; resume=auto goes on behind the last epoch")
        sys.exit(130)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


@contextmanager
def one_line_errors(run_dir: Path, out_dir: Path) -> Iterator[None]:
    """Inside a run: what the user can mend ends it with one line and code 2.

    These are ValueError, OSError, a loss that is not finite, and Hydra's own errors. A folder in
    which the run has not yet written anything is removed again, with those above it that are then
    empty, up to ``out_dir``; a loss that is not finite is a result, and leaves failed.json there.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, HydraException) as error:
        if world().writes:
            if isinstance(error, FloatingPointError):
                write_json(run_dir / FAILED, {"error": str(error)})
            _remove_unused(run_dir, out_dir)
        if FULL_ERROR:
            raise
        _stop(error)


def _stop(error: BaseException) -> NoReturn:
    # Each process tells of another's death: the one that else speaks may be the dead one.
    if world().writes or isinstance(error, ConnectionError):
        _say(explain(error))
    sys.exit(2)


def _say(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)


def explain(error: BaseException) -> str:
    """The error in one line: the value, and what to change where that is known."""
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:
        return explain(cause)
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
    if not run_dir.is_dir() or {p.name for p in run_dir.iterdir()} - HYDRAS_OWN:
        return
    shutil.rmtree(run_dir)
    for folder in run_dir.parents:
        if out_dir.resolve() not in folder.resolve().parents or any(folder.iterdir()):
            return
        folder.rmdir()
