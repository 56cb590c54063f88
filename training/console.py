"""Set up a command's standard streams and Ctrl-C before anything heavy is imported.

Uses only the standard library: importing torch takes seconds, and a user may press Ctrl-C then.
"""

import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


class _Unbroken(io.FileIO):
    """A stream that drops what it cannot write, because its reader is gone or the disk is full."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return len(data)  # type: ignore[arg-type]


def prepare(program: str) -> None:
    """Reopen closed standard streams, make them UTF-8, and handle Ctrl-C.

    A run must not end or lose anything because nobody reads its output. Until `ready` is called,
    Ctrl-C ends the process at once with one line and exit code 130. ``python -O`` is rejected with
    one line, since Hydra's parser relies on assertions.
    """
    _open_closed_streams()
    if not __debug__:
        line = "python -O cannot read settings; leave out -O, -OO and PYTHONOPTIMIZE"
        write_stderr(f"{program}: {line}\n")
        os._exit(2)
    if os.name == "nt":
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    else:
        sys.stdout = sys.__stdout__ = _text_stream(1)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _text_stream(2)  # type: ignore[misc]

    def leave(number: int, frame: FrameType | None) -> None:
        write_stderr(f"{program}: interrupted while starting\n")
        os._exit(130)

    # If SIGINT is ignored, as in the background of a script, it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def ready() -> None:
    """Restore Python's own handling of Ctrl-C, which raises KeyboardInterrupt."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def write_stderr(text: str) -> None:
    """Write directly to file descriptor 2, which is safe in a signal handler."""
    with suppress(OSError):
        os.write(2, text.encode())


def print_error(program: str, line: str) -> None:
    """Print one line on stderr."""
    print(f"{program}: {line}", file=sys.stderr, flush=True)


def stop(program: str, line: str, code: int = 2) -> NoReturn:
    """End the process with one line on stderr."""
    print_error(program, line)
    sys.exit(code)


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, without the advice that may follow it."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _open_closed_streams() -> None:
    # Otherwise the next file opened, a checkpoint for example, could get the number of stderr.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def _text_stream(number: int) -> io.TextIOWrapper:
    raw = _Unbroken(number, "w", closefd=False)
    # File names may contain bytes that are not UTF-8: they are printed unchanged.
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="surrogateescape", line_buffering=True
    )
