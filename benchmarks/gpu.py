"""Check and measure what needs a GPU, in the minutes that one is available.

    python -m benchmarks.gpu --minutes 25 --data FOLDER
    python -m benchmarks.gpu --minutes 5 --rehearse

The tests of the fused kernels come first, then the others that need a GPU, then training steps with
fused and sdpa. The remaining minutes go to full training by compare.py: WRN-16-8, plain and
augmented, five seeds, or WRN-16-4 with sdpa if the kernels failed their tests. Timings after that
run only if training leaves time. The same command continues: finished steps are not repeated,
training goes on, and what was stopped or has failed goes last. --out gets record.json and, for each
step, its log and a folder of results. --data is the folder of CIFAR-100. A step whose packages are
missing fails, and its log says so. --rehearse runs a small case of each step on the CPU.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aaconv import text
from benchmarks import timing
from training.files import write_text

ROOT = Path(__file__).resolve().parent.parent
# Time that a step gets to save and exit by itself before it is killed.
GRACE_S = 15.0
# A step with less time than this is not started.
MIN_S = 5.0
# Part of training's time that is left for compare.py's report after the last run has stopped.
REPORT_S = 60.0

PYTEST = "-m pytest -q -W default -p no:cacheprovider"
BENCH = "-m benchmarks.bench {name} --out {out}"
COMPARE = "scripts/compare.py --out {out} --max-minutes {minutes}"
SETTINGS = "experiment=short compile=false tracking=csv"
WIDE = "model.name=wrn16_8 model.widths=[128,256,512]"
SMALL = "experiment=lookup data.train_size=96 data.test_size=40 model.widths=[4,8,8] model.stem=4"
WRN_16_8 = f"{COMPARE} --seeds 0 1 2 3 4 -- {SETTINGS} {WIDE}"
WITHOUT_FUSED = (
    f"{COMPARE} --seeds 0 1 2 3 --vary attention=none,ge,se --vary attention=aa "
    f"attention.backend=sdpa -- {SETTINGS}"
)


class Step(NamedTuple):
    """Arguments for Python, a limit in minutes, and the arguments of a small case for the CPU."""

    name: str
    minutes: float
    words: str
    small: str


def bench(step: str, minutes: float, words: str, small: str) -> Step:
    """Return a step that runs the benchmark named by the first part of the step's name."""
    command = BENCH.replace("{name}", step.partition("-")[0])
    small = f"{command} --rounds 1 --device cpu {small}"
    return Step(step, minutes, f"{command} --rounds 10 {words}", small)


def plan(fused_failed: bool) -> list[Step]:
    """Return all steps in order."""
    fused = f"{PYTEST} -n 8 tests/test_fused.py -k 'not card and not report'"
    few = f"{PYTEST} tests/test_fused.py -k without_tables -m 'not slow'"
    files = " ".join(
        f"tests/test_{name}.py" for name in ("gpu", "resume", "data_batches", "training")
    )
    on_gpu = f"{PYTEST} -n 8 -m gpu {files}"
    networks = "--model wrn28_10 wrn16_4 --batch 128 --channels-last yes --backend"
    network = "--model resnet8 --batch 2 --backend"
    maps = "--size 8 16 32 --dtype bfloat16"
    training = WITHOUT_FUSED if fused_failed else WRN_16_8
    return [
        Step("fused-tests", 2.5, fused, few),
        Step("gpu-tests", 1.5, on_gpu, f"{PYTEST} tests/test_gpu.py"),
        bench("step-fused", 1, f"{networks} fused", f"{network} tiled"),
        bench("step-sdpa", 1, f"{networks} sdpa", f"{network} sdpa"),
        Step("training", math.inf, training, f"{COMPARE} -- {SMALL} epochs=1 tracking=csv"),
        bench("kernels", 2, "--measure 128", "--capability 90 --shape 8x8:8:4:4"),
        bench("attention", 2, f"{maps} --heads 8 --logits 1e9", "--size 4 --logits 1e4"),
        bench("layer", 2, f"{maps} --batch 128 --channels-last yes", "--size 4 --batch 2 --dv 8"),
    ]


def remaining(states: dict[str, str]) -> list[Step]:
    """Return the steps to run; stopped and failed ones come last, and training always goes on."""
    steps = plan(states.get("fused-tests") == "failed")
    left = [s for s in steps if s.name == "training" or states.get(s.name) != "done"]
    return sorted(left, key=lambda s: s.name != "training" and s.name in states)


def run(step: Step, seconds: float, out: Path, rehearse: bool, data: str | None) -> dict[str, Any]:
    """Run a step for at most ``seconds`` and return its entry for record.json.

    A step that is not done by then gets SIGTERM, as from a cluster, and is then killed.
    """
    minutes = max(0.01, (seconds - REPORT_S) / 60)
    line = step.small if rehearse else step.words
    line = line.format(out=shlex.quote(str(out / step.name)), minutes=f"{minutes:.2f}")
    environment = os.environ | ({} if data is None else {"CIFAR_ROOT": str(Path(data).resolve())})
    environment.pop("TRITON_INTERPRET", None)  # the tests set it themselves if there is no GPU
    started, code = time.monotonic(), None
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(line)],
            cwd=ROOT,
            env={"TORCHINDUCTOR_COMPILE_THREADS": "2"} | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            end(process)
    state = "stopped" if code is None else "failed" if code else "done"
    return {"state": state, "seconds": time.monotonic() - started, "command": f"python {line}"}


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process and its children to exit, and kill them after `GRACE_S` seconds."""
    for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def main() -> int:
    """Run what is left of the plan; return 1 if a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--data", metavar="FOLDER", help="default: $CIFAR_ROOT")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true", help="small cases on the CPU")
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes:g} must be above 0")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --rehearse needs none")
    deadline = time.monotonic() + 60 * args.minutes
    about = timing.facts(torch.device("cpu" if args.rehearse else "cuda"))
    out, file = args.out.resolve(), args.out.resolve() / "record.json"
    record = json.loads(file.read_text()) if file.exists() else {"about": about, "steps": {}}
    if record["about"]["hardware"] != about["hardware"]:
        parser.error(f"{out} is of {record['about']['hardware']}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    begun: set[str] = set()
    while True:
        states = {name: entry["state"] for name, entry in record["steps"].items()}
        step = next((s for s in remaining(states) if s.name not in begun), None)
        left = deadline - time.monotonic()
        if step is None or left < MIN_S:
            break
        begun.add(step.name)
        print(f"{step.name} ...", flush=True)
        seconds = min(60 * step.minutes, left)
        record["steps"][step.name] = run(step, seconds, out, args.rehearse, args.data)
        write_text(file, json.dumps(record, indent=1) + "\n")
    entries = record["steps"].items()
    rows = [[name, entry["state"], f"{entry['seconds']:.0f} s"] for name, entry in entries]
    print(*text.table(rows, "llr"), f"logs and results: {out}", sep="\n")
    return int(any(entry["state"] == "failed" for _, entry in entries))


if __name__ == "__main__":
    sys.exit(main())
