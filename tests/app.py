"""Run this project's commands in real processes, forked from a server with preloaded libraries.

A normal start takes two to four seconds of a core, nearly all of it for importing torch and other
libraries. Forking from a process that has already imported them takes a tenth of a second, and
everything else is the same: the child runs the whole script as ``__main__``, imports the project's
own modules, and has its own exit code, working directory, environment, streams and signals. Tests
of what a command imports, or of what Python or a library reads at its start (`READ_ONCE` variables,
closed streams, Ctrl-C during imports, ``python -O``), need a real start, by `subprocess`.
"""

import atexit
import gc
import importlib
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The environment of the server, recorded before any test changes it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# Prefixes of environment variables that are read only once, when a process or a library starts.
READ_ONCE = (
    *("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "ATEN_", "CUDA_", "GOMP_", "KMP_", "MKL_"),
    *("MPL", "NUMEXPR_", "OMP_", "OPENBLAS_", "TORCH_", "TRITON"),
)
# Libraries that are slow to import. A missing or uninstalled one only costs time.
LIBRARIES = """
torch torch._dynamo torch.distributed torch.optim.swa_utils torch.utils.flop_counter antlr4 filelock
hydra hydra._internal.utils hydra.experimental.callback hydra.utils jinja2 joblib matplotlib.pyplot
omegaconf omegaconf._impl PIL.Image safetensors.torch scipy.stats submitit tqdm
"""


# ---- In the tests -------------------------------------------------------------------------------


class App(subprocess.Popen):
    """A `subprocess.Popen` for a command whose process is forked by the server.

    ``words`` start with the script, or with ``-c`` and a program.
    """

    def __init__(
        self, words, *, env=None, stdin=subprocess.DEVNULL, start_new_session=False, **options
    ):
        env = dict(os.environ if env is None else env)
        changed = {
            name
            for name in ENVIRONMENT.keys() | env.keys()
            if name.startswith(READ_ONCE) and env.get(name) != ENVIRONMENT.get(name)
        } - {"OMP_NUM_THREADS"}
        if changed:
            raise ValueError(f"{', '.join(changed)}: needs a real start, by subprocess")
        self._session = start_new_session
        super().__init__(list(map(str, words)), env=env, stdin=stdin, **options)

    # The three methods through which Popen starts a child, polls it, and waits for it.

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        streams = rest[3:9]
        stdin, _, _, stdout, _, stderr = streams
        request = {"words": args, "cwd": str(cwd or os.getcwd()), "env": env}
        request["session"] = self._session
        self._status, told = os.pipe()
        # -1 means that the child inherits the tests' own stream.
        handles = [
            own if handle == -1 else handle for own, handle in enumerate((stdin, stdout, stderr))
        ]
        try:
            socket.send_fds(server(), [json.dumps(request).encode()], [*handles, told])
        finally:
            os.close(told)
            self._close_pipe_fds(*streams)
        self.pid = int.from_bytes(os.read(self._status, 4), "big")
        if not self.pid:
            raise RuntimeError("the server of tests/app.py has ended")

    def _internal_poll(self, *_, **__):
        with suppress(subprocess.TimeoutExpired):
            return self._wait(0)

    def _wait(self, timeout):
        if self.returncode is None:
            seconds = None if timeout is None else max(0.0, timeout)
            if not select.select([self._status], [], [], seconds)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            told = os.read(self._status, 4)
            if not told:
                raise RuntimeError("the server of tests/app.py has ended")
            self.returncode = os.waitstatus_to_exitcode(int.from_bytes(told, "big"))
            os.close(self._status)
        return self.returncode


def run_app(words, *, check=False, timeout=240, text=True, **options):
    """Like `subprocess.run` with both output streams captured."""
    with App(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text, **options
    ) as process:
        try:
            said = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, *said)
    if check:
        done.check_returncode()
    return done


def fork(command, **options):
    """Like `subprocess.Popen` for a Python command; used by `forked_runs`."""
    assert command[0] == sys.executable, command
    return App(command[1:], **options)


_server = []


def server():
    """Return the socket of the server, starting it on the first call."""
    if not _server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        _server.extend((ours, process))
    return _server[0]


def stop_server():
    """Stop the server, which kills the processes it has forked that still run."""
    if _server:
        ours, process = _server
        ours.close()
        process.wait(60)
        _server.clear()


# ---- In the server ------------------------------------------------------------------------------


def import_libraries():
    """Import the slow libraries but keep no project module, so each process imports its own."""
    sys.path[0] = str(ROOT)
    import data.vision  # torchvision's import may need its help

    kept = [sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "data"]
    for name in LIBRARIES.split():
        with suppress(ImportError):
            importlib.import_module(name)
    del sys.path[0]
    assert data.vision in kept
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be forked"
    gc.freeze()
    return kept


def serve(requests):
    """Fork for each request and report how the process ended; return only in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running = {}
    while True:
        for ready in select.select([requests, *running], [], [])[0]:
            if ready is not requests:
                pid, told = running.pop(ready)
                with suppress(BrokenPipeError):
                    os.write(told, os.waitpid(pid, 0)[1].to_bytes(4, "big"))
                os.close(told)
                os.close(ready)
                continue
            message, streams, *_ = socket.recv_fds(requests, 2**20, 4)
            if not message:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if not pid:
                requests.close()
                for handle, (_, told) in running.items():
                    os.close(handle)
                    os.close(told)
                return become(streams, **json.loads(message))
            *streams, told = streams
            for stream in streams:
                os.close(stream)
            os.write(told, pid.to_bytes(4, "big"))
            running[os.pidfd_open(pid)] = pid, told


def become(streams, words, cwd, env, session):
    """Make this process look like a newly started one; return the words to run."""
    if session:
        os.setsid()
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = cwd
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = words
    return words


def run(words):
    """Run a script, or the program after ``-c``, as Python does."""
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def leave():
    """End the process as soon as all other atexit handlers have run.

    Otherwise, tearing down a thousand or so modules would take longer than everything before.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if isinstance(ended_by, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    code = ended_by.code if isinstance(ended_by, SystemExit) else ended_by and 1
    os._exit(code if isinstance(code, int) else bool(code))


if __name__ == "__main__":
    ended_by = None
    atexit.register(leave)  # registered first, so called last
    kept = import_libraries()
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        run(words)
    except BaseException as error:
        ended_by = error
        raise
