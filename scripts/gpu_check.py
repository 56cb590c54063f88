"""Check and measure everything that only a GPU can show, in the time there is for it.

    python scripts/gpu_check.py [--minutes 25] [--device auto] [--data FOLDER] [--out FOLDER]

In this order: the tests of the kernels and of training on a GPU; attention and the layer, every
backend; training steps with fused and sdpa; kernel times against what the count of their
instructions allows; and slices of `experiment=short`, plain and augmented. Each part has its share
of the time, and what one leaves the next ones have. The same command goes on where it was stopped.
What cannot run here is skipped, and the page says why; PyTorch, hydra-core and tqdm are enough for
most.
Writes check.json, gpu_check.md, and for each step its log and its tables below the folder.

On a CPU (--device cpu) it is a rehearsal, of small cases.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting import timing
from training.device import choose_device

ROOT = Path(__file__).resolve().parent.parent
# Of the minutes; the parts run in this order.
SHARES = {"tests": 0.3, "layers": 0.15, "steps": 0.25, "kernels": 0.1, "training": 0.2}
# What a step gets to stop by itself before it is killed, and to save a checkpoint.
GRACE_S = 15
# A step that would have less does not begin.
LEAST_S = 5


@dataclass
class Step:
    """A command of a part, and what it needs."""

    part: str
    name: str
    command: list[str]
    modules: tuple[str, ...] = ()
    table: str | None = None
    lacks: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def tests(on_gpu: bool) -> list[Step]:
    """The tests of the kernels first; without a GPU some of them, in Triton's interpreter."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
    ]
    if not on_gpu:
        few = [*command, "-m", "not slow", "tests/test_fused.py", "-k", "without_tables"]
        return [
            Step("tests", "kernels", few, modules=("pytest", "triton", "hydra", "tqdm")),
            Step("tests", "on a GPU", command, lacks="no GPU"),
        ]
    kernels = [*command, "tests/test_fused.py", "-k", "not card and not report"]
    return [
        Step("tests", "kernels", kernels, modules=("pytest", "triton", "hydra", "tqdm")),
        Step(
            "tests",
            "on a GPU",
            [*command, "tests/test_gpu.py"],
            modules=("pytest", "hydra", "tqdm"),
        ),
    ]


def benchmark(part: str, name: str, script: str, *words: object) -> Step:
    """A step that runs one of the scripts, which writes a table."""
    command = [sys.executable, f"scripts/{script}.py", *map(str, words)]
    return Step(part, name, command, table=f"{script}.md")


def layers(device: torch.device, on_gpu: bool) -> list[Step]:
    """Attention by itself and the layer, with every backend."""
    where = ("--device", device.type)
    if not on_gpu:
        small = ("--sizes", 4, "--rounds", 2)
        return [
            benchmark(
                *("layers", "attention", "bench_attention", *where, *small, "--keys", 8),
                *("--values", 2, "--logits", 1e5),
            ),
            benchmark(
                *("layers", "layer", "bench_layer", *where, *small, "--batches", 2),
                *("--channels", 16, "--dk", 16, "--dv", 8, "--Nh", 2, "--channels-last"),
            ),
        ]
    rounds = ("--rounds", 10)
    return [
        benchmark(
            *("layers", "attention", "bench_attention", *where, *rounds, "--heads", 8),
            *("--sizes", 8, 16, 32, "--dtypes", "bfloat16", "--logits", 1e9),
        ),
        benchmark(
            *("layers", "layer", "bench_layer", *where, *rounds, "--channels-last"),
            *("--sizes", 8, 16, 32, "--batches", 128, "--dtypes", "bfloat16"),
        ),
    ]


def steps(device: torch.device, on_gpu: bool) -> list[Step]:
    """Training steps of whole networks with the two backends that `auto` may take on a GPU."""
    where = ("--device", device.type, "--channels-last")
    if not on_gpu:
        small = ("--models", "resnet8", "--batch", 8, "--rounds", 2)
        return [
            benchmark("steps", f"resnet8, {b}", "bench_step", *where, *small, "--backend", b)
            for b in ("sdpa", "tiled")
        ]
    made = []
    for model, words in (("wrn28_10", ()), ("wrn28_10", ("--compile",)), ("wrn16_4", ())):
        for backend in ("fused", "sdpa"):
            about = ("--models", model, "--batch", 128, "--rounds", 10, "--backend", backend)
            name = ", ".join([model, backend, *("compiled" for _ in words)])
            made.append(benchmark("steps", name, "bench_step", *where, *about, *words))
    return made


def kernels(on_gpu: bool) -> list[Step]:
    """Times against the count of instructions; without a GPU the count alone."""
    words: tuple[object, ...] = ("--measure", 128)
    if not on_gpu:
        words = ("--capabilities", 90, "--shapes", "8x8:8:4:4")
    step = benchmark("kernels", "kernels", "bench_kernels", *words)
    step.modules = ("triton",)
    return [step]


def training(device: torch.device, on_gpu: bool, data: str | None, out: Path) -> list[Step]:
    """Slices of `experiment=short`, plain and augmented; each gets half of what is left."""
    words = ["experiment=short"]
    lacks = None
    environment = {}
    if not on_gpu:
        words = ["experiment=lookup", "data.train_size=256", "epochs=2"]
    elif data is None:
        lacks = "no CIFAR-100: name its folder with --data"
    else:
        environment["CIFAR_ROOT"] = str(Path(data).resolve())  # the command runs elsewhere
    made = []
    for attention in ("none", "aa"):
        folder = out / "training" / attention
        command = [sys.executable, "train.py", *words, f"attention={attention}", "resume=auto"]
        command += ["tracking=csv", f"device={device.type}", f"run_dir={folder}"]
        step = Step("training", attention, command, ("hydra", "tqdm"), None, lacks, environment)
        made.append(step)
    return made


def plan(device: torch.device, data: str | None, out: Path) -> list[Step]:
    """All steps in their order, with what each lacks here."""
    on_gpu = device.type == "cuda"
    made = [*tests(on_gpu), *layers(device, on_gpu), *steps(device, on_gpu), *kernels(on_gpu)]
    made += training(device, on_gpu, data, out)
    for step in made:
        needed = (*step.modules, "hydra") if step.part == "steps" else step.modules
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing and step.lacks is None:
            step.lacks = f"no package {', '.join(missing)}"
    return made


def limit(left: list[Step], seconds: float) -> float:
    """The seconds of the first of the steps that are left: its share among theirs."""
    shares = [SHARES[step.part] / sum(other.part == step.part for other in left) for step in left]
    return seconds * shares[0] / sum(shares)


def run(step: Step, seconds: float, log: Path) -> str:
    """Run a step for at most so many seconds; returns what became of it.

    A step that is not done is asked to stop, as a cluster does, and then killed.
    """
    environment = os.environ | step.environment
    environment.pop("TRITON_INTERPRET", None)  # nobody wants its times; the tests ask for it
    with log.open("w") as stream:
        stream.write(f"{' '.join(step.command)}\n")
        stream.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return "stopped"
        except BaseException:
            _end(process)
            raise
    return "done" if code == 0 else f"failed with exit code {code}"


def timed(step: Step, seconds: float, folder: Path) -> dict[str, Any]:
    """The entry of a step in check.json, once it has run."""
    folder.mkdir(parents=True, exist_ok=True)
    if step.table is not None:
        step.command += ["--out", str(folder)]
    began = time.monotonic()
    state = run(step, seconds, folder / "log.txt")
    return {"state": state, "seconds": time.monotonic() - began, "command": step.command}


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def page(out: Path, record: dict[str, Any], planned: list[Step]) -> str:
    """The Markdown page of what there is by now."""
    about = record["about"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines = [f"{about['hardware']}; {versions}; commit {about['commit']}; `{about['command']}`", ""]
    if record["device"] == "cpu":
        lines += ["A rehearsal on a CPU: small cases, and no figure of it says anything.", ""]
    cells = []
    for step in planned:
        entry = record["steps"].get(key(step), {"state": "not begun"})
        seconds = f"{entry['seconds']:.0f}" if "seconds" in entry else ""
        cells.append([step.part, step.name, entry["state"], seconds])
    lines.append(timing.markdown(["part", "step", "what became of it", "seconds"], cells, 3))
    for step in planned:
        entry = record["steps"].get(key(step))
        if entry is None or "seconds" not in entry:
            continue
        lines += ["", f"## {step.part}: {step.name}", ""]
        lines.append(_result(out, step))
    return "\n".join(lines) + "\n"


def _result(out: Path, step: Step) -> str:
    """The table of a step, the last row of its metrics, or the end of its log."""
    folder = out / folder_of(step)
    if step.table is not None and (folder / step.table).exists():
        return (folder / step.table).read_text().strip()
    metrics = out / "training" / step.name / "metrics.csv"
    if step.part == "training" and metrics.exists():
        header, *rows = metrics.read_text().splitlines()
        cells = [row.split(",") for row in rows[-1:]]
        return timing.markdown(header.split(","), cells, text_columns=0)
    log = folder / "log.txt"
    return "\n".join(["```", *log.read_text(errors="replace").splitlines()[-5:], "```"])


def key(step: Step) -> str:
    """The name of a step in check.json."""
    return f"{step.part}: {step.name}"


def folder_of(step: Step) -> str:
    """The folder of a step's log and table."""
    return f"{step.part}/{step.name}".replace(", ", "-").replace(" ", "-")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", help="folder that has CIFAR-100", default=os.getenv("CIFAR_ROOT"))
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_check")
    args = parser.parse_args()
    if not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes {args.minutes:g} must be above 0")
    return args


def main() -> int:
    """Run what is left of the plan; 1 if a step has failed."""
    args = arguments()
    try:
        device = choose_device(args.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    out = args.out.resolve()
    ends = time.monotonic() + 60 * args.minutes
    planned = plan(device, args.data, out)
    record = load(out, device)
    out.mkdir(parents=True, exist_ok=True)
    for step in planned:
        if step.lacks is not None:
            record["steps"][key(step)] = {"state": f"skipped: {step.lacks}"}
    states = {name: entry["state"] for name, entry in record["steps"].items()}
    left = [s for s in planned if s.lacks is None and states.get(key(s)) != "done"]
    while left:
        seconds = limit(left, ends - time.monotonic())
        step = left.pop(0)
        if seconds >= LEAST_S:
            print(f"{key(step)}, for at most {seconds:.0f} s", flush=True)
            entry = timed(step, seconds, out / folder_of(step))
            print(f"  {entry['state']} after {entry['seconds']:.0f} s", flush=True)
            record["steps"][key(step)] = entry
        save(out, record, planned)
    print((out / "gpu_check.md").read_text().split("\n## ")[0])
    print(f"The page: {out / 'gpu_check.md'}")
    became = [entry["state"] for entry in record["steps"].values()]
    if "stopped" in became or len(became) < len(planned):
        print("Not all is done; the same command goes on.")
    return int(any(state.startswith("failed") for state in became))


def load(out: Path, device: torch.device) -> dict[str, Any]:
    """What an earlier call has done on this kind of device, or nothing."""
    about = timing.facts(device)
    with suppress(FileNotFoundError, ValueError):
        record = json.loads((out / "check.json").read_text())
        if record["device"] != device.type or record["about"]["hardware"] != about["hardware"]:
            sys.exit(
                f"error: {out} holds a check of {record['about']['hardware']}; choose another --out"
            )
        return dict(record)
    return {"device": device.type, "about": about, "steps": {}}


def save(out: Path, record: dict[str, Any], planned: list[Step]) -> None:
    """Write check.json and the page."""
    text = json.dumps(record, indent=1) + "\n"
    (out / "check.json.part").write_text(text)
    (out / "check.json.part").replace(out / "check.json")
    (out / "gpu_check.md").write_text(page(out, record, planned))


if __name__ == "__main__":
    sys.exit(main())
