"""Kill a training run at random moments, resume it each time, and check that nothing differs.

    python -m tests.fault_test
    python -m tests.fault_test --kills 20 --processes 2 -- checkpoint_minutes=0.02

A small run is trained once without interruption. Then the same command runs in another folder, and
is killed by SIGKILL and restarted until it finishes; if it finishes before all kills are used,
another run follows. A quarter of the kills hit the start-up, the others any moment after it. At the
end, weights, optimizer, averaged weights, RNGs, rows and summary must be bitwise equal to those of
the first run; only times and memory may differ. The exit code is 1 if anything else differs.

Arguments after ``--`` go to train.py. With ``--processes N``, torchrun starts N processes.
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

# Uses every feature that has a state, with a checkpoint after every step.
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

# Values that depend on the clock, the machine's memory or the folder's name.
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
    """One SIGKILL: the run, the time since the process started, and what it interrupted."""

    run: int
    after_s: float
    during: str
    epochs: int  # finished epochs in the newest checkpoint
    step: int  # steps of the next epoch in that checkpoint


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Return the places where two nested values are not bitwise equal, except for ``FREE``."""
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
    """Return the outputs of a finished run: checkpoint, metrics rows as text, summary."""
    with (folder / run_folder.METRICS).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        run_folder.LAST: torch.load(folder / run_folder.LAST, weights_only=True),
        run_folder.METRICS: rows,
        run_folder.SUMMARY: run_folder.read_summary(folder),
    }


def begin(folder: Path, overrides: list[str], processes: int) -> subprocess.Popen[bytes]:
    """Start or resume the run of ``folder``; its output is appended to ``folder``.txt."""
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
    """Wait for the run to end.

    Raises:
        RuntimeError: if it did not exit with code 0; the message has the last line it printed.
    """
    if run.wait() != 0:
        printed = folder.with_suffix(".txt").read_text().splitlines()[-1:]
        raise RuntimeError(f"{folder}: train.py ended with code {run.returncode}: {printed}")


def kill(run: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants: torchrun's workers would otherwise continue."""
    run.send_signal(signal.SIGSTOP)  # so that it starts no others meanwhile
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
    """Return when the newest checkpoint was written, in ns, or 0 if there is none."""
    try:
        return (folder / run_folder.LAST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for(run: subprocess.Popen[bytes], folder: Path, seconds: float, training: bool) -> bool:
    """Whether the run is alive ``seconds`` after now or, if ``training``, its next checkpoint."""
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
    """Return what a kill interrupted, and the newest checkpoint's epochs and step after it."""
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
    """Run the whole test below ``out``; return the outcome, also written to faults.json.

    Raises:
        FileExistsError: if ``out`` already exists.
        RuntimeError: if train.py failed without being killed.
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
    # Many kills are spread over about one run; a few kills still reach its end.
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
    """Return the kills as a Markdown table, followed by the counts of lost or differing values."""
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
