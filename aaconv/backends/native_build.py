"""Compiles native.cpp with this machine's C++ compiler, once, and loads it.

The result is kept in the user's cache (``$XDG_CACHE_HOME/aaconv``, by default ``~/.cache/aaconv``)
under a digest of everything that it depends on. What lies there is loaded only if nobody else could
have put it there.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")
OPENMP = "-fopenmp"
BUILD_SECONDS = 300


class UnavailableError(Exception):
    """There is no kernel on this machine; the message goes on after "the backend"."""


class RefusedError(UnavailableError):
    """The compiler has ended with an error."""


@cache
def load() -> ctypes.CDLL | UnavailableError:
    """The compiled kernel, or why there is none; built at the first call in a new environment.

    What is wrong is logged in one line.
    """
    try:
        return _load()
    except UnavailableError as error:
        log.warning("attention on the CPU runs without the compiled kernel: it %s", error)
        return error


def _load() -> ctypes.CDLL:
    if os.name != "posix":
        raise UnavailableError("needs Linux or macOS")
    compiler = _compiler()
    name = f"native-{_digest(compiler)}.so"
    folder = _cache_folder()
    if folder is not None:
        with suppress(OSError), _locked(folder / "lock"):  # others wait for the one that builds
            if not _is_own(folder / name):
                _build(compiler, folder / name)
            return _open(folder / name)
    with tempfile.TemporaryDirectory(prefix="aaconv-") as temporary:
        _build(compiler, Path(temporary, name))
        return _open(Path(temporary, name))


def _compiler() -> list[str]:
    """The command, from CXX if it is set."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        path = shutil.which(command[0]) if command else None
        if path is not None:
            return [path, *command[1:]]
    where = f"CXX={chosen} is none" if chosen else f"none of {', '.join(COMPILERS)} is in PATH"
    raise UnavailableError(f"needs a C++ compiler, and {where}")


def _digest(compiler: list[str]) -> str:
    at = os.stat(os.path.realpath(compiler[0]))
    facts = [*compiler, *FLAGS, str(at.st_size), str(at.st_mtime_ns), *_processor()]
    text = SOURCE.read_bytes() + "\0".join(facts).encode()
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def _processor() -> list[str]:
    """What ``-march=native`` depends on."""
    names = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(names)})


def _cache_folder() -> Path | None:
    """The user's own folder for what is compiled; None if there cannot be one."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "aaconv")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_own(folder) and os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # a home that does not exist, or is not known
        return None


def _is_own(path: Path) -> bool:
    """Whether it is there, this user's, and nobody else's to change."""
    try:
        at = path.lstat()
    except OSError:
        return False
    others_write = stat.S_IWGRP | stat.S_IWOTH
    kind = stat.S_ISDIR(at.st_mode) or stat.S_ISREG(at.st_mode)
    return kind and at.st_uid == os.geteuid() and not at.st_mode & others_write


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        with suppress(ImportError):  # then each process compiles for itself
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: list[str], target: Path) -> None:
    """Compile to ``target``, which is there whole or not at all.

    Raises:
        OSError: nothing can be written there.
        UnavailableError: the compiler does not, or was killed.
    """
    log.info("compiling the attention kernel for this processor, once")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        linked = Path(folder, "native.so")
        # Linked without a library for OpenMP it uses the one that torch has loaded. Two of them
        # would have threads of their own, which wait for work by taking the other's processors.
        # Where that one is another (clang's compiler, GNU's library) and its own is not there, one
        # thread computes.
        for openmp, library in (([OPENMP], []), ([OPENMP], [OPENMP]), ([], [])):
            try:
                _compile(compiler, openmp, library, linked)
                ctypes.CDLL(str(linked))
                break
            except (OSError, RefusedError):
                if not openmp:
                    raise
        linked.chmod(0o700)
        linked.replace(target)


def _compile(compiler: list[str], openmp: list[str], library: list[str], target: Path) -> None:
    compiled = target.with_suffix(".o")
    _call([*compiler, *FLAGS, *openmp, "-c", str(SOURCE), "-o", str(compiled)])
    _call([*compiler, "-shared", *library, str(compiled), "-o", str(target)])


def _call(command: list[str]) -> None:
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"was not compiled within {BUILD_SECONDS} s") from None
    if said.returncode < 0:
        raise UnavailableError(f"was not compiled: signal {-said.returncode} ended {command[0]}")
    if said.returncode > 0:
        lines = [line for line in said.stderr.splitlines() if "error" in line]
        why = (lines or said.stderr.splitlines() or [f"exit code {said.returncode}"])[0]
        raise RefusedError(f"was not compiled by {command[0]}: {why.strip()}")


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"cannot be loaded: {error}") from error
