"""Hydra 1.3 on Python 3.14."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lazy_help_allowed() -> Iterator[None]:
    """Let an argparse option have a help that becomes text only when it is printed.

    Python 3.14 expands the help of an option when the option is added ("badly formed help string"),
    which fails for the object that Hydra 1.3 passes for --shell-completion. Inside, only helps that
    are strings are checked. With an older Python this changes nothing.
    """
    container: Any = argparse._ActionsContainer
    check = getattr(container, "_check_help", None)
    if check is None:
        yield
        return

    def check_strings(self: Any, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check(self, action)

    container._check_help = check_strings
    try:
        yield
    finally:
        container._check_help = check
