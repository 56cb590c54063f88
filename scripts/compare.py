"""Train a network and its twins over several seeds, then report: one command, one table.

    python scripts/compare.py
    python scripts/compare.py --variants none aa se --seeds 0 1 2 -- model=resnet20 epochs=30

What stands behind ``--`` goes to train.py as it is; by default that is experiment=lookup. The
comparison's folder, below outputs/compare/, is named by it. The same command again skips runs that
are finished and continues the others.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from report import report

ROOT = Path(__file__).resolve().parent.parent


def run_folder(comparison: Path, variant: str, seed: int) -> Path:
    """Where one run of a comparison lies."""
    return comparison / f"attention={variant}" / f"seed={seed}"


def train(folder: Path, variant: str, seed: int, overrides: list[str], out_dir: Path) -> None:
    """One run of train.py, continued if ``folder`` holds a part of it.

    Raises:
        subprocess.CalledProcessError: train.py stopped; it has said why.
    """
    command = [sys.executable, str(ROOT / "train.py"), f"attention={variant}", *overrides]
    # Quoted for Hydra, which would read the "=" of the folder's name as its own.
    command += [f"seed={seed}", "resume=auto", f"out_dir='{out_dir}'", f"hydra.run.dir='{folder}'"]
    subprocess.run(command, check=True)


def compare(variants: list[str], seeds: list[int], overrides: list[str], out_dir: Path) -> Path:
    """Run what is missing of the comparison and write its report; returns its folder."""
    comparison = out_dir / "compare" / "_".join(overrides).replace("/", "-")
    runs = [(variant, seed) for seed in seeds for variant in variants]
    for number, (variant, seed) in enumerate(runs, start=1):
        folder = run_folder(comparison, variant, seed)
        finished = (folder / "summary.json").exists()
        state = "finished before" if finished else "training"
        print(f"[{number}/{len(runs)}] attention={variant} seed={seed}: {state}", flush=True)
        if not finished:
            train(folder, variant, seed, overrides, out_dir)
    folders = [run_folder(comparison, variant, seed) for variant, seed in runs]
    print("", report(folders, comparison), sep="\n")
    return comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--variants", nargs="+", default=["none", "aa"], metavar="ATTENTION")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs")
    parser.add_argument("overrides", nargs="*", default=["experiment=lookup"])
    arguments = parser.parse_args()
    try:
        folder = compare(arguments.variants, arguments.seeds, arguments.overrides, arguments.out)
    except subprocess.CalledProcessError as stopped:
        sys.exit(stopped.returncode)
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: {error}")
    print(f"report: {folder / 'report.md'}, {folder / 'curves.png'}")


if __name__ == "__main__":
    main()
