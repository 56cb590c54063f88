"""Files that are whole or absent, whenever the process is killed or the machine fails.

Text is UTF-8, whatever the locale says.
"""

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def write_text(path: Path, text: str) -> None:
    """``text`` as a file; see `write_files`."""
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Several text files; see `write_files`."""
    # Names of folders may hold bytes that are no UTF-8; they come out as they went in.
    write_files({path: t.encode(errors="surrogateescape") for path, t in texts.items()})


def write_files(
    files: Mapping[Path, bytes | Callable[[IO[bytes]], Any]], before: Path | None = None
) -> None:
    """Several files, all of them staged before the first one is replaced, each in one move.

    Folders that are not there are made. A disk that fills up meanwhile leaves every file as it was,
    and no folder that was not there; so does whatever else is raised.

    Args:
        files: the contents, or a function that writes them to an open file.
        before: where to keep what was there instead of a single file. A kill between the two moves
            leaves that one alone, whole.

    Raises:
        OSError: the disk is full or a folder cannot be written; the message names the file.
    """
    made: list[Path] = []
    staged: list[Path] = []
    path = None
    try:
        for path, content in files.items():
            make_folder(path.parent, made)
            staged.append(_partial(path))
            _stage(staged[-1], content)
        for path in files:
            if before is not None and path.exists():
                os.replace(path, before)
            os.replace(_partial(path), path)
        for folder in {path.parent for path in files}:
            _sync_folder(folder)
    except BaseException as error:
        for partial in staged:
            with suppress(IsADirectoryError):
                partial.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
        raise


def make_folder(path: Path, made: list[Path]) -> None:
    """Make the folder ``path`` and those that it lies in; what was not there is added to ``made``.

    Raises:
        OSError: it cannot be made.
    """
    for folder in reversed([f for f in (path, *path.parents) if not f.is_dir()]):
        try:
            folder.mkdir()
        except FileExistsError:  # another process has been quicker
            if not folder.is_dir():
                code = errno.ENOTDIR
                raise NotADirectoryError(code, os.strerror(code), str(folder)) from None
        else:
            made.append(folder)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """``rows``, the header first, as the text of a CSV file; None is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, which has no NaN and no infinity: those raise ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _stage(partial: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    # What is there was left by a kill, or is a link to another file or a pipe, which would wait.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename is on the disk only once its folder is. Windows has no such call.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
