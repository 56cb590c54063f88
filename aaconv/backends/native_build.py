"""Compiles native.cpp with this machine's C++ compiler, once, and loads it.

The result is kept in the user's cache (``$XDG_CACHE_HOME/aaconv``, by default ``~/.cache/aaconv``)
as ``native-FACTS-CONTENT.so``: a digest of all that it depends on, and one of its bytes. What lies
there is loaded only if it is what was written and nobody else could have put it there.
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
WAIT_SECONDS = 120  # for another process that compiles
MAX_BYTES = 2**26  # of a kernel, which takes a hundredth of it


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
        reason = one_line(error)
    except OSError as error:  # of the file system, or because what was compiled is no kernel
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
    """The kernel in the cache; of several processes that find none, one builds it."""
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
    """Whether no other process holds the lock: where there are no locks, none does."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return True
    return True


def _kept(name: str, folder: Path) -> ctypes.CDLL | None:
    """The kernel that was kept in ``folder``; None where there is none that is whole and loads."""
    for path in folder.glob(f"{name}-*.so"):
        with suppress(OSError):
            if _is_own(path) and path.stem == f"{name}-{_digest(path.read_bytes())}":
                return _open(path)
    return None


def _compiler() -> list[str]:
    """The command, from CXX if it is set."""
    chosen = os.environ.get("CXX")
    with suppress(ValueError):  # a quotation without its end
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
    """Of the kernel, by everything that it depends on."""
    at = os.stat(os.path.realpath(compiler[0]))
    facts = [*compiler, *FLAGS, str(at.st_size), str(at.st_mtime_ns), *_processor()]
    text = SOURCE.read_bytes() + os.fsencode("\0".join(facts))
    return f"native-{_digest(text)}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


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
        return folder if _is_own(folder) else None
    except (OSError, RuntimeError):  # a home that does not exist, or is not known
        return None


def _is_own(path: Path) -> bool:
    """Whether it is there, of a size that can be, this user's, and nobody else's to change."""
    try:
        at = path.lstat()
    except OSError:
        return False
    others_write = stat.S_IWGRP | stat.S_IWOTH
    kind = stat.S_ISDIR(at.st_mode) or (stat.S_ISREG(at.st_mode) and at.st_size <= MAX_BYTES)
    return kind and at.st_uid == os.geteuid() and not at.st_mode & others_write


def _build(compiler: list[str], name: str, folder: Path | None) -> ctypes.CDLL:
    """Compile and load the kernel; keep it in ``folder``, whole or not at all, where there is one.

    Raises:
        OSError: nothing can be written there, or what the compiler has written is no kernel.
        UnavailableError: the compiler does not, or was killed.
    """
    log.info("compiling the attention kernel for this processor, once")
    with tempfile.TemporaryDirectory(
        dir=folder, prefix="build-", ignore_cleanup_errors=True
    ) as temporary:
        linked = Path(temporary, "native.so")
        # Linked without a library for OpenMP it uses the one that torch has loaded. Two of them
        # would have threads of their own, which wait for work by taking the other's processors.
        # Where that one is another (clang's compiler, GNU's library) and its own is not there, one
        # thread computes.
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
            with suppress(OSError):  # something else has its name
                linked.replace(target)
        return kernel


def _compile(compiler: list[str], openmp: list[str], library: list[str], target: Path) -> None:
    compiled = target.with_suffix(".o")
    _call([*compiler, *FLAGS, *openmp, "-c", str(SOURCE), "-o", str(compiled)])
    _call([*compiler, "-shared", *library, str(compiled), "-o", str(target)])


def _call(command: list[str]) -> None:
    # In a session of its own: what the compiler starts ends with it.
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
        OSError: it is missing, cut short, lacks a function, or does not load.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    content = path.read_bytes()
    # An ELF file ends with the table of its sections. One that is cut short would end this process.
    if content.startswith(b"\x7fELF\x02") and len(content) >= 64:
        start, size, count = struct.unpack_from("=40xQ10xHH", content)
        if len(content) < start + size * count:
            raise OSError(f"{path} is truncated")
    kernel = ctypes.CDLL(str(path))
    for function in FUNCTIONS:
        if not hasattr(kernel, function):
            raise OSError(f"{path} has no function {function}")
    return kernel
