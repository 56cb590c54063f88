"""What all commands share: safe streams and Ctrl-C, help, and errors in one line."""

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

# Of wandb; train.py and compare.py take the same.
PROJECT = os.environ.get("WANDB_PROJECT", "aaconv")

AddOptions = Callable[[argparse.ArgumentParser], None]


def start(file: str, add_options: AddOptions) -> NoReturn:
    """Run a script's ``main`` as a command.

    The script calls it before it imports anything heavy, and is imported here as a module of this
    package: torch takes seconds to import, in which a user may press Ctrl-C, and which help and a
    wrong option need not wait for.
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

    The help is the module's docstring. A wrong option, an error of which
    `training.errors.is_for_the_user`, and ``errors`` are one line on stderr and end the process
    with code 2; Ctrl-C ends it with 130, or with the argument that a KeyboardInterrupt has.
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
                # Hydra, which it imports, takes a while that help and a wrong option need not.
                from training.errors import explain, is_for_the_user

                if not (is_for_the_user(error) or isinstance(error, errors)):
                    raise
                console.stop(program, printable(explain(error)))

        return call

    return decorate


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, instead of a page of usage."""

    def __init__(self, program: str, description: str | None, add_options: AddOptions) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=program, description=description, formatter_class=form)
        # As from Python 3.14 on: -1,2 is a value, which is then told what is wrong with it.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        add_options(self)

    def error(self, message: str) -> NoReturn:
        line = message.removeprefix("argument ")
        hint = " (--help shows all options)" if line == message else ""
        console.stop(self.prog, printable(line) + hint)


def number(kind: type[int] | type[float], **bounds: float) -> Callable[[str], Any]:
    """A ``type`` for an option that is a number within the bounds of a `configs.setting.Range`."""

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
    """The words that are paths, also where their names have ``=``, and the settings NAME=VALUE."""

    def is_path(word: str) -> bool:
        # No name of a setting has a slash. Not Path.exists, which raises an error where a setting
        # is longer than a file's name may be.
        name, equals, _ = word.partition("=")
        return not equals or "/" in name or os.path.exists(os.path.expanduser(word))

    paths = [word for word in words if is_path(word)]
    return paths, [word for word in words if word not in paths]


def check_out(folder: Path) -> None:
    """Raises ValueError or OSError if no folder can be there; before what is written is computed.

    Whether there is room for it, and the right to make it, is found when it is written.
    """
    with suppress(FileNotFoundError):
        if not S_ISDIR(os.stat(folder).st_mode):
            raise ValueError(f"--out {folder} is not a folder")
