"""Starting train.py in a process of its own, and ending it."""

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

# Names a file for the line with which train.py ends, for who has started it.
REASON = "AACONV_REASON"

# How long a run may take to save and end after it was interrupted.
SAVE_TIMEOUT_S = 60.0


def override(key: str, value: Any) -> str:
    """``key=value`` as Hydra reads it: as this value, even where a text has a "=" or a "," in it.

    Args:
        key: a setting's name.
        value: a text, a path, or what JSON has a form for.
    """
    return f"{key}={_quoted(f'{value}') if isinstance(value, str | Path) else json.dumps(value)}"


def _quoted(text: str) -> str:
    # In Hydra's grammar a backslash is itself, except before a quote and before an interpolation.
    text = re.sub(r"(\\*)('|\$\{|$)", lambda m: 2 * m[1] + (f"\\{m[2]}" if m[2] else ""), text)
    return f"'{text}'"


def shell_override(key: str, value: str | Path) -> str:
    """`override` as one word of a shell's command line."""
    word = override(key, value)
    # Double quotes are easier to read than what shlex makes of single ones.
    return f'"{word}"' if not set(word) & set('"$`\\!\n') else shlex.quote(word)


def start(
    overrides: Iterable[str], run_dir: Path, out_dir: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """train.py with these settings, in the folder ``run_dir``.

    What the environment ``env`` says of one run of wandb's is left out. A terminal's Ctrl-C does
    not reach the run: who has started it passes it on, see `interrupt`.
    """
    where = [override("out_dir", out_dir.absolute()), override("run_dir", run_dir.absolute())]
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *overrides, *where],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={k: v for k, v in env.items() if k not in WANDB_RUN_VARS},
    )


def interrupt(run: subprocess.Popen[bytes]) -> None:
    """Ask a run to save and end; one that does not is killed.

    By SIGTERM: a shell's background job, and what it starts, ignores Ctrl-C.
    """
    run.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            run.wait(SAVE_TIMEOUT_S)
    finally:
        run.kill()
