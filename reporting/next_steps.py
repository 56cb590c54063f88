"""What to do next with a comparison whose runs are all finished."""

import shlex
import sys
from pathlib import Path

from training import run_folder
from training.comparison import PlannedRun

ROOT = Path(__file__).resolve().parent.parent
# With fewer seeds than this an interval says little.
ENOUGH_SEEDS = 3
PURPOSES = {
    "evaluate.py": "classes, calibration, speed",
    "visualize.py": "what attention looks at",
    "compare.py": f"{ENOUGH_SEEDS} seeds: an interval",
    "export.py": "ONNX and torch.export",
}


def next_commands(
    runs: list[PlannedRun], vary: list[list[str]], overrides: list[str], out_dir: Path
) -> list[str]:
    """Up to three commands, to be pasted where compare.py was called with such arguments."""
    first = [run for run in runs if run.seed == runs[0].seed]
    augmented = [r for r in first if run_folder.read_summary(r.folder)["attention"] == "aa"]
    # What is kept with a network does not say where its images are.
    where = [word for word in overrides if word.startswith("data.root=")]
    commands = [["evaluate.py", *(_shown(run.folder) for run in first), *where]]
    commands += [["visualize.py", _shown(run.folder), *where] for run in augmented[:1]]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    if len(seeds) < ENOUGH_SEEDS:
        more = seeds + [s for s in range(max(seeds) + ENOUGH_SEEDS) if s not in seeds]
        words = [word for group in vary for word in ("--vary", *group)]
        if out_dir.absolute() != ROOT / "outputs":
            words += ["--out", _shown(out_dir)]
        words = [*map(str, more[:ENOUGH_SEEDS]), *words, "--", *overrides]
        commands.append(["compare.py", "--seeds", *words])
    commands.append(["export.py", _shown((augmented or first)[0].folder)])
    python = _shown(Path(sys.executable)) if sys.executable else "python"
    return [
        f"{shlex.join([python, _shown(ROOT / 'scripts' / script), *words])}  # {PURPOSES[script]}"
        for script, *words in commands[:3]
    ]


def _shown(path: Path) -> str:
    """A path as it is shortest from here; links stay links, as .venv/bin/python is one."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
