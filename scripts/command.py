"""Shared by all commands: safe streams, Ctrl-C, help, and one-line errors."""

import argparse
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NoReturn

from reporting.text import printable
from training import console

# Default wandb project, the same as for train.py and compare.py.
PROJECT = os.environ.get("WANDB_PROJECT", "aaconv")

AddOptions = Callable[[argparse.ArgumentParser], None]


def start(file: str, add_options: AddOptions) -> NoReturn:
    """Run a script's ``main`` as a command.

    The script calls this before it imports anything heavy, and is then imported as a module of this
    package: importing torch takes seconds, in which a user may press Ctrl-C, and which help and the
    message on a wrong option must not wait for.
    """
    console.prepare(Path(file).name)
    _Parser(Path(file).name, sys.modules["__main__"].__doc__, add_options).parse_args()
    script = importlib.import_module(f"scripts.{Path(file).stem}")
    console.ready()
    sys.exit(script.main())


def command(
    add_options: AddOptions, *, errors: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[], None]]:
    """Wrap ``main(args)`` in a function that parses the command line.

    The help is the module's docstring. A wrong option, an error for which
    `training.errors.is_for_the_user` is true, and ``errors`` print one line on stderr and exit with
    code 2; Ctrl-C exits with 130, or with the argument of the KeyboardInterrupt.
    """

    def decorate(main: Callable[[argparse.Namespace], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def call() -> None:
            program = f"{main.__module__.rpartition('.')[2]}.py"
            parser = _Parser(program, sys.modules[main.__module__].__doc__, add_options)
            args = parser.parse_args()
            try:
                main(args)
            except KeyboardInterrupt as stopped:
                console.stop(program, "interrupted", *(stopped.args or (130,)))
            except Exception as error:
                # Imported late: it imports Hydra, which help and a wrong option need not wait for.
                from training.errors import explain, is_for_the_user

                if not (is_for_the_user(error) or isinstance(error, errors)):
                    raise
                console.stop(program, printable(explain(error)))

        return call

    return decorate


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of a page of usage."""

    def __init__(self, program: str, description: str | None, add_options: AddOptions) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=program, description=description, formatter_class=form)
        # As in Python 3.14: -1,2 is a value, so that the error says what is wrong with it.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        add_options(self)

    def error(self, message: str) -> NoReturn:
        line = message.removeprefix("argument ")
        hint = " (--help shows all options)" if line == message else ""
        console.stop(self.prog, printable(line) + hint)


def number(kind: type[int] | type[float], **bounds: float) -> Callable[[str], Any]:
    """Return a ``type`` for options: numbers within the bounds of a `configs.setting.Range`."""

    def read(word: str) -> int | float:
        from configs.setting import Range

        allowed = Range(**bounds)  # type: ignore[arg-type]
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not allowed.allows(value):
            what = "whole" if kind is int else "finite"
            raise argparse.ArgumentTypeError(f"{word} must be a {what} number, {allowed.words()}")
        return value

    return read


def paths_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words into paths, which may contain ``=``, and settings NAME=VALUE."""

    def is_path(word: str) -> bool:
        # The name of a setting has no slash. Not Path.exists, which raises an error if a setting
        # is longer than a file name may be.
        name, equals, _ = word.partition("=")
        return not equals or "/" in name or os.path.exists(os.path.expanduser(word))

    paths = [word for word in words if is_path(word)]
    return paths, [word for word in words if word not in paths]


def check_out(folder: Path) -> None:
    """Raise ValueError or OSError if ``folder`` cannot be a folder; to be called before any work.

    Missing space or permission to create it is found only when it is written.
    """
    with suppress(FileNotFoundError):
        if not S_ISDIR(os.stat(folder).st_mode):
            raise ValueError(f"--out {folder} is not a folder")
