"""Write files atomically: each is whole or absent even if the process or the machine dies.

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
    """Write ``text`` to a file; see `write_files`."""
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write several text files; see `write_files`."""
    # Folder names in a text may contain bytes that are not UTF-8; they are written unchanged.
    write_files({path: t.encode(errors="surrogateescape") for path, t in texts.items()})


def write_files(
    files: Mapping[Path, bytes | Callable[[IO[bytes]], Any]], before: Path | None = None
) -> None:
    """Write several files: stage all of them first, then move each into place.

    Missing folders are created. If the disk fills up or any other error is raised while staging,
    all existing files stay as they were and new folders are removed.

    Args:
        files: by path, the content or a function that writes it to an open file.
        before: where to keep the previous version, if ``files`` is a single file. A kill between
            the two moves leaves only that version, whole.

    Raises:
        OSError: if the disk is full or a folder is not writable; the message names the file.
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
            with suppress(OSError):  # another process has put something into it
                folder.rmdir()
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
        raise


def make_folder(path: Path, made: list[Path]) -> None:
    """Create the folder ``path`` and missing parents, and append the new ones to ``made``.

    Raises:
        OSError: if a folder cannot be created.
    """
    for folder in reversed([f for f in (path, *path.parents) if not f.is_dir()]):
        try:
            folder.mkdir()
        except FileExistsError:  # another process was faster, or it is not a folder
            if not folder.is_dir():
                code = errno.ENOTDIR
                raise NotADirectoryError(code, os.strerror(code), str(folder)) from None
        else:
            made.append(folder)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return ``rows``, header first, as the text of a CSV file; None becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity, which JSON lacks, raise ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _stage(partial: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    # Remove a leftover of a killed process, a link to another file, or a pipe, which would block.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its folder is synced, which Windows does not support.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
