"""Kill a training run at random moments, resume it each time, and look for any trace of that.

    python -m tests.fault_test
    python -m tests.fault_test --kills 20 --processes 2 -- checkpoint_minutes=0.02

A small run is made once without interruption. Then the same command runs in another folder, is
ended by SIGKILL and started again, until it is finished and all kills have been given; a run that
finishes before is followed by another. A quarter of the moments are in the start-up, the others
anywhere after it. At the end weights, optimizer, averaged weights, RNGs, rows and summary must be
those of the first run, to the bit; only times and memory may differ. Exit code 1 if anything else
does.

What comes after ``--`` goes to train.py. With ``--processes`` torchrun starts that many.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training import checkpoint, launch, run_folder

ROOT = Path(__file__).resolve().parent.parent

# A little of everything that has a state, and a checkpoint after every step.
SMALL = [
    "experiment=lookup",
    "data.train_size=96",
    "data.test_size=96",
    "augmentation={crop_pad:2,flip:alternating,cutout:8,policy:rand,erasing:0.5,mixup:1,cutmix:1}",
    "model.widths=[4,8,8]",
    "model.stem=4",
    "model.aa={stages:[3],dk:0.5,dv:0.25,Nh:4,min_dkh:8}",
    "batch_size=16",
    "epochs=8",
    "eval_batch_size=16",
    "ema=0.99",
    "precision=fp16",
    "grad_clip=1.0",
    "checkpoint_minutes=1e-9",
    "tracking=csv",
    "resume=auto",
]

# What the clock or the folder's name decides.
FREE = {
    "seconds",
    "peak_memory_mib",
    "perf/images_per_s",
    "perf/peak_memory_mib",
    "perf/epoch_seconds",
    "perf/total_seconds",
    "out_dir",
    "run_dir",
    "wandb_id",
}


class Kill(NamedTuple):
    """One SIGKILL: of which run, how long after the process's start, and what it interrupted."""

    run: int
    after_s: float
    during: str
    epochs: int  # finished in the newest checkpoint
    step: int  # and steps of the next one


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """The places where two nested values differ, by a bit, other than in ``FREE``."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted((a.keys() | b.keys()) - FREE, key=str)
        gone = object()
        return [d for k in keys for d in differences(a.get(k, gone), b.get(k, gone), f"{at}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{at}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    return [] if type(a) is type(b) and a == b else [at]


def results(folder: Path) -> dict[str, Any]:
    """All that a finished run has left: its checkpoint, its rows as text, its summary."""
    with (folder / run_folder.METRICS).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        run_folder.LAST: torch.load(folder / run_folder.LAST, weights_only=True),
        run_folder.METRICS: rows,
        run_folder.SUMMARY: run_folder.read_summary(folder),
    }


def begin(folder: Path, overrides: list[str], processes: int) -> subprocess.Popen[bytes]:
    """The run of ``folder``, or what is left of it; what it prints goes to ``folder``.txt."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    where = [
        launch.override("out_dir", folder.parent.absolute()),
        launch.override("run_dir", folder.absolute()),
    ]
    with folder.with_suffix(".txt").open("ab") as output:
        return subprocess.Popen(
            [*command, str(launch.TRAIN), *overrides, *where],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Sums depend on the number of threads, and processes share the cores.
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )


def end_well(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the run's end.

    Raises:
        RuntimeError: it did not end with code 0; the message has the last line it has printed.
    """
    if run.wait() != 0:
        printed = folder.with_suffix(".txt").read_text().splitlines()[-1:]
        raise RuntimeError(f"{folder}: train.py ended with code {run.returncode}: {printed}")


def kill(run: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and all below it: torchrun's processes would continue without it."""
    run.send_signal(signal.SIGSTOP)  # it starts no others meanwhile
    family = [run.pid]
    for pid in family:
        for children in Path("/proc").glob(f"{pid}/task/*/children"):
            with suppress(OSError):
                family += map(int, children.read_text().split())
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()


def saved_at(folder: Path) -> int:
    """When the newest checkpoint was written, in ns; 0 without one."""
    try:
        return (folder / run_folder.LAST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for(run: subprocess.Popen[bytes], folder: Path, seconds: float, training: bool) -> bool:
    """Whether the run still lives after so long: from now, or from its next checkpoint."""
    before = saved_at(folder)
    while training and saved_at(folder) in (0, before):
        if run.poll() is not None:
            return False
        time.sleep(0.001)
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def seen(folder: Path, launched: int, steps: int) -> tuple[str, int, int]:
    """What a kill interrupted, and the epochs and the step in the newest checkpoint after it."""
    written = [p for p in folder.glob("*.partial") if p.stat().st_mtime_ns >= launched]
    epochs = step = 0
    found = checkpoint.find("auto", folder)
    if found:
        state = torch.load(found[0], weights_only=True)
        epochs, step = len(state["rows"]), state["epoch_state"]["step"]
    if written:
        return f"writing {written[0].stem}", epochs, step
    if saved_at(folder) < launched:
        return "start-up", epochs, step
    return "evaluation" if step == steps else "training", epochs, step


def fault_test(
    out: Path, *, kills: int, seed: int, processes: int, overrides: list[str]
) -> dict[str, Any]:
    """Run all of it below ``out``; returns what is printed and written to faults.json.

    Raises:
        FileExistsError: there has been one before.
        RuntimeError: train.py failed without being killed.
    """
    out.mkdir(parents=True)
    whole, begun = out / "whole", time.monotonic()
    run = begin(whole, overrides, processes)
    wait_for(run, whole, 0, training=True)
    startup = time.monotonic() - begun
    end_well(run, whole)
    training = time.monotonic() - begun - startup
    expected = results(whole)
    config = expected[run_folder.SUMMARY]["config"]
    steps = config["data"]["train_size"] // config["batch_size"]

    draw = random.Random(seed)
    early = set(draw.sample(range(kills), kills // 4))
    # So that many kills are spread over about one run, and a few do not miss its end.
    longest = min(0.8, 1.6 / max(1, kills - len(early))) * training
    given: list[Kill] = []
    differing: list[str] = []
    number = damaged = missing = repeated = 0
    while number == 0 or len(given) < kills:
        number += 1
        folder = out / f"killed-{number}"
        finished = False
        while not finished:
            launched, begun = time.time_ns(), time.monotonic()
            run = begin(folder, overrides, processes)
            if len(given) < kills:
                late = len(given) not in early
                if wait_for(run, folder, draw.uniform(0, longest if late else startup), late):
                    kill(run)
                    after = round(time.monotonic() - begun, 2)
                    given.append(Kill(number, after, *seen(folder, launched, steps)))
                    continue
            end_well(run, folder)
            finished = True
        found = results(folder)
        differing += [f"{folder.name}{place}" for place in differences(expected, found)]
        epochs = [row["epoch"] for row in found[run_folder.METRICS]]
        missing += len({row["epoch"] for row in expected[run_folder.METRICS]} - set(epochs))
        repeated += len(epochs) - len(set(epochs))
        damaged += folder.with_suffix(".txt").read_text().count("is damaged")
    outcome = {
        "command": ["train.py", *overrides],
        "processes": processes,
        "seed": seed,
        "kills": len(given),
        "runs": number,
        "missing_rows": missing,
        "repeated_rows": repeated,
        "damaged_checkpoints": damaged,
        "differing": differing,
        "uninterrupted_s": round(startup + training, 2),
        "startup_s": round(startup, 2),
        "torch": torch.__version__,
        "hardware": expected[run_folder.SUMMARY]["segments"][0]["hardware"],
        "commit": expected[run_folder.SUMMARY]["segments"][0]["commit"],
        "moments": [kill._asdict() for kill in given],
    }
    (out / "faults.json").write_text(json.dumps(outcome, indent=1) + "\n")
    return outcome


def table(outcome: dict[str, Any]) -> str:
    """The kills as a Markdown table, and below it what they have cost."""
    lines = ["| kill | run | s after its start | during | checkpoint after it |"]
    lines += ["|---:|---:|---:|---|---|"]
    for number, kill in enumerate(outcome["moments"], start=1):
        saved = f"epoch {kill['epochs']}, step {kill['step']}"
        lines += [f"| {number} | {kill['run']} | {kill['after_s']} | {kill['during']} | {saved} |"]
    counts = ", ".join(
        f"{outcome[key]} {key.replace('_', ' ')}"
        for key in ("kills", "runs", "missing_rows", "repeated_rows", "damaged_checkpoints")
    )
    return "\n".join([*lines, "", f"{counts}, {len(outcome['differing'])} values that differ"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "faults")
    parser.add_argument("overrides", nargs="*", default=[])
    args = parser.parse_args()
    try:
        outcome = fault_test(
            args.out,
            kills=args.kills,
            seed=args.seed,
            processes=args.processes,
            overrides=[*SMALL, *args.overrides],
        )
    except (OSError, RuntimeError) as error:
        sys.exit(f"fault_test: {error}")
    print(table(outcome), *outcome["differing"], f"{args.out / 'faults.json'}", sep="\n")
    sys.exit(1 if outcome["differing"] else 0)


if __name__ == "__main__":
    main()
