"""What all commands share: safe streams and Ctrl-C, help, and errors in one line."""

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from reporting.text import printable
from training import console

AddOptions = Callable[[argparse.ArgumentParser], None]


def start(file: str) -> NoReturn:
    """Run a script's ``main`` as a command.

    The script calls it before its own imports, and is imported here as a module of this package:
    torch takes seconds to import, in which a user may press Ctrl-C.
    """
    console.prepare(Path(file).name)
    script = importlib.import_module(f"scripts.{Path(file).stem}")
    console.ready()
    sys.exit(script.main())


def command(
    add_options: AddOptions, *, code: int = 2, errors: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[], None]]:
    """Make of ``main(args)`` a function that reads the command line.

    The help is the module's docstring. ValueError, OSError, Hydra's errors and ``errors`` are one
    line on stderr and end the process with ``code``, Ctrl-C ends it with 130.
    """

    def decorate(main: Callable[[argparse.Namespace], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def call() -> None:
            program = f"{main.__module__.rpartition('.')[2]}.py"
            parser = argparse.ArgumentParser(
                prog=program,
                description=sys.modules[main.__module__].__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            add_options(parser)
            args = parser.parse_args()
            try:
                main(args)
            except KeyboardInterrupt:
                console.stop(program, "interrupted", 130)
            except Exception as error:
                if not isinstance(error, (*_expected(), *errors)):
                    raise
                console.stop(program, printable(_explain(error)), code)

        return call

    return decorate


def paths_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that are no settings NAME=VALUE, or are files of such a name, and the settings."""
    paths = [word for word in words if "=" not in word or Path(word).exists()]
    return paths, [word for word in words if word not in paths]


def _expected() -> tuple[type[Exception], ...]:
    # Imported when it is needed: `start` prepares the streams before anything is that is slow.
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return ValueError, OSError, HydraException, OmegaConfBaseException


def _explain(error: Exception) -> str:
    from training.errors import explain

    return explain(error)
