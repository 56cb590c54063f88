"""Compile native.cpp once with this machine's C++ compiler, and load it.

The result is kept in the user's cache (``$XDG_CACHE_HOME/aaconv``, by default ``~/.cache/aaconv``)
as ``native-FACTS-CONTENT.so``: a digest of everything it depends on, and one of its bytes. A cached
file is loaded only if its content matches and no other user could have written it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from aaconv.text import one_line

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")
OPENMP = "-fopenmp"
FUNCTIONS = ("aaconv_attend", "aaconv_attend_backward")
BUILD_SECONDS = 300
WAIT_SECONDS = 120  # for another process that is compiling
MAX_BYTES = 2**26  # of a compiled kernel, about a hundred times its usual size


class UnavailableError(Exception):
    """No kernel is available on this machine; the message continues "the backend ..."."""


class RefusedError(UnavailableError):
    """The compiler exited with an error."""


@cache
def load() -> ctypes.CDLL | UnavailableError:
    """Return the compiled kernel, or an error saying why there is none; built if not cached.

    The reason is also logged in one line.
    """
    try:
        return _load()
    except UnavailableError as error:
        reason = one_line(error)
    except OSError as error:  # from the file system, or because the compiled file does not load
        reason = f"was not compiled: {one_line(error)}"
    log.warning("attention on the CPU runs without the compiled kernel: it %s", reason)
    return UnavailableError(reason)


def _load() -> ctypes.CDLL:
    if os.name != "posix":
        raise UnavailableError("needs Linux or macOS")
    compiler = _compiler()
    name = _name(compiler)
    folder = _cache_folder()
    if folder is not None:
        with suppress(OSError):
            return _kept_or_built(compiler, name, folder)
    return _build(compiler, name, None)


def _kept_or_built(compiler: list[str], name: str, folder: Path) -> ctypes.CDLL:
    """Return the cached kernel; if there is none, only one of several processes builds it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
    try:
        for attempt in range(10 * WAIT_SECONDS):
            locked = _lock(lock)
            kernel = _kept(name, folder)
            if kernel is None and locked:
                kernel = _build(compiler, name, folder)
            if kernel is not None:
                return kernel
            if attempt == 0:
                log.warning("waiting while another process compiles the attention kernel")
            time.sleep(0.1)
    finally:
        os.close(lock)
    raise UnavailableError(f"is still being compiled by another process after {WAIT_SECONDS} s")


def _lock(descriptor: int) -> bool:
    """Try to take the lock; return False if another process holds it, True without lock support."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return True
    return True


def _kept(name: str, folder: Path) -> ctypes.CDLL | None:
    """Return the kernel cached in ``folder``; None if there is none, or it is damaged."""
    for path in folder.glob(f"{name}-*.so"):
        with suppress(OSError):
            if _is_own(path) and path.stem == f"{name}-{_digest(path.read_bytes())}":
                return _open(path)
    return None


def _compiler() -> list[str]:
    """Return the compiler command, from CXX if set."""
    chosen = os.environ.get("CXX")
    with suppress(ValueError):  # unbalanced quotes
        for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
            path = shutil.which(command[0]) if command else None
            if path is not None:
                return [path, *command[1:]]
    where = (
        f"CXX={chosen} is not a program in PATH"
        if chosen
        else f"none of {', '.join(COMPILERS)} is in PATH"
    )
    raise UnavailableError(f"needs a C++ compiler, but {where}")


def _name(compiler: list[str]) -> str:
    """Return the first part of the kernel's file name, from a digest of all it depends on."""
    at = os.stat(os.path.realpath(compiler[0]))
    facts = [*compiler, *FLAGS, str(at.st_size), str(at.st_mtime_ns), *_processor()]
    text = SOURCE.read_bytes() + os.fsencode("\0".join(facts))
    return f"native-{_digest(text)}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _processor() -> list[str]:
    """Return the processor features that ``-march=native`` depends on."""
    names = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return sorted({line for line in lines if line.startswith(names)})


def _cache_folder() -> Path | None:
    """Return the user's own folder for compiled kernels; None if it cannot be used or created."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "aaconv")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_own(folder) else None
    except (OSError, RuntimeError):  # the home directory is missing or unknown
        return None


def _is_own(path: Path) -> bool:
    """Return whether ``path`` exists, belongs to this user alone, and has a plausible size."""
    try:
        at = path.lstat()
    except OSError:
        return False
    others_write = stat.S_IWGRP | stat.S_IWOTH
    kind = stat.S_ISDIR(at.st_mode) or (stat.S_ISREG(at.st_mode) and at.st_size <= MAX_BYTES)
    return kind and at.st_uid == os.geteuid() and not at.st_mode & others_write


def _build(compiler: list[str], name: str, folder: Path | None) -> ctypes.CDLL:
    """Compile and load the kernel; if ``folder`` is given, cache the complete file there.

    Raises:
        OSError: if nothing can be written there, or the compiled file does not load.
        UnavailableError: if the compiler fails, takes too long or is killed.
    """
    log.info("compiling the attention kernel for this processor, once")
    with tempfile.TemporaryDirectory(
        dir=folder, prefix="build-", ignore_cleanup_errors=True
    ) as temporary:
        linked = Path(temporary, "native.so")
        # First try without linking an OpenMP library: the kernel then uses the one torch has
        # loaded. Two libraries would each have a thread pool whose idle threads compete for the
        # CPU. If torch's does not match (clang here, GNU's in torch), link the compiler's own; if
        # that is missing, build a single-threaded kernel.
        for openmp, library in (([OPENMP], []), ([OPENMP], [OPENMP]), ([], [])):
            try:
                _compile(compiler, openmp, library, linked)
                kernel = _open(linked)
                break
            except (OSError, RefusedError):
                if not openmp:
                    raise
        if folder is not None:
            linked.chmod(0o700)
            with linked.open("rb") as file:
                os.fsync(file.fileno())
                target = folder / f"{name}-{_digest(file.read())}.so"
            with suppress(OSError):  # the name is taken, for example by a folder
                linked.replace(target)
        return kernel


def _compile(compiler: list[str], openmp: list[str], library: list[str], target: Path) -> None:
    compiled = target.with_suffix(".o")
    _call([*compiler, *FLAGS, *openmp, "-c", str(SOURCE), "-o", str(compiled)])
    _call([*compiler, "-shared", *library, str(compiled), "-o", str(target)])


def _call(command: list[str]) -> None:
    # In its own session, so that killing the group also ends processes the compiler started.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            _, stderr = process.communicate(timeout=BUILD_SECONDS)
        except BaseException as error:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UnavailableError(f"was not compiled within {BUILD_SECONDS} s") from None
            raise
    if process.returncode < 0:
        raise UnavailableError(f"was not compiled: signal {-process.returncode} ended {command[0]}")
    if process.returncode > 0:
        lines = [line for line in stderr.splitlines() if "error" in line]
        why = (lines or stderr.splitlines() or [f"exit code {process.returncode}"])[0]
        raise RefusedError(f"was not compiled by {command[0]}: {why.strip()}")


def _open(path: Path) -> ctypes.CDLL:
    """Load the kernel.

    Raises:
        OSError: if it is missing or truncated, lacks a function, or does not load.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    content = path.read_bytes()
    # An ELF file ends with its section table. Loading a truncated file would crash this process.
    if content.startswith(b"\x7fELF\x02") and len(content) >= 64:
        start, size, count = struct.unpack_from("=40xQ10xHH", content)
        if len(content) < start + size * count:
            raise OSError(f"{path} is truncated")
    kernel = ctypes.CDLL(str(path))
    for function in FUNCTIONS:
        if not hasattr(kernel, function):
            raise OSError(f"{path} has no function {function}")
    return kernel
