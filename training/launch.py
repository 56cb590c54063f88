"""Start train.py in its own process, and stop it."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.tracking import WANDB_RUN_VARS

TRAIN = Path(__file__).resolve().parent.parent / "train.py"

# Environment variable: the file to which train.py writes its error message for its parent process.
REASON = "AACONV_REASON"

# How long a run may take to save and exit after an interrupt.
SAVE_TIMEOUT_S = 60.0


def override(key: str, value: Any) -> str:
    """Return ``key=value`` quoted for Hydra, so that even a text with "=" or "," is read as it is.

    Args:
        key: the name of a setting.
        value: a text, a path, or any JSON value.
    """
    return f"{key}={_quoted(f'{value}') if isinstance(value, str | Path) else json.dumps(value)}"


def _quoted(text: str) -> str:
    # In Hydra's grammar a backslash is literal, except before a quote or an interpolation.
    text = re.sub(r"(\\*)('|\$\{|$)", lambda m: 2 * m[1] + (f"\\{m[2]}" if m[2] else ""), text)
    return f"'{text}'"


def shell_override(key: str, value: str | Path) -> str:
    """Return `override` quoted as one word of a shell command."""
    word = override(key, value)
    # Double quotes are easier to read than shlex's escapes of single quotes.
    return f'"{word}"' if not set(word) & set('"$`\\!\n') else shlex.quote(word)


def start(
    overrides: Iterable[str], run_dir: Path, out_dir: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start train.py with these settings in the folder ``run_dir``.

    wandb's variables for a single run are removed from the environment ``env``. A terminal's Ctrl-C
    does not reach the run: the caller must pass it on, see `interrupt`.
    """
    where = [override("out_dir", out_dir.absolute()), override("run_dir", run_dir.absolute())]
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *overrides, *where],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={k: v for k, v in env.items() if k not in WANDB_RUN_VARS},
    )


def interrupt(run: subprocess.Popen[bytes]) -> None:
    """Ask a run to save and exit, and kill it if it does not.

    The signal is SIGTERM, because a shell's background job and its children ignore SIGINT.
    """
    run.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            run.wait(SAVE_TIMEOUT_S)
    finally:
        run.kill()
