"""Time and count: one command, with a benchmark as its first word.

    python -m benchmarks.bench attention --rounds 7
    python -m benchmarks.bench step --model resnet20 wrn16_4 --batch 32
    python -m benchmarks.bench NAME --help

attention, every backend by itself; layer, the layer against other ways to compute it; step, a
training step of the networks in configs/; augment, one of torchvision's networks; batches, the cost
of augmentation compared with a step; images, batches from the cache of decoded images; kernels, the
code that the compiler generates for the GPU kernels. Options take several values, and each
combination is a case. NAME.json and NAME.md are written after every case, so that a stopped
benchmark leaves its results so far. Times are medians (minimum to maximum) of interleaved rounds,
ratios are medians of the rounds' ratios. Compare only within a table: machines differ, and drift
between runs.
"""

import argparse
import importlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from aaconv import text
from benchmarks import timing
from training.device import choose_device
from training.errors import explain, is_for_the_user
from training.files import write_texts

NAMES = ("attention", "layer", "step", "augment", "batches", "images", "kernels")
OUT = Path(__file__).resolve().parent.parent / "outputs" / "bench"


def parse(words: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the benchmark that the words name, a module of this package, and its options.

    It has ``OPTIONS``, the default values of each option, where all values of an option in
    ``TOGETHER`` belong to one case; ``CHOICES``; ``measure(case, device, rounds)``, which returns
    rows or raises a one-line ValueError; and ``cells(row)``, a row's table cells by header.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=form)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    benchmark = importlib.import_module(f"benchmarks.{args.name}")
    parser = argparse.ArgumentParser(
        prog=f"bench {args.name}", description=benchmark.__doc__, formatter_class=form
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER")
    choices = getattr(benchmark, "CHOICES", {})
    for name, values in benchmark.OPTIONS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+",
            type=type(values[0]),
            choices=choices.get(name),
            default=values,
            help=f"default: {' '.join(map(str, values))}",
        )
    options = parser.parse_args(args.options)
    options.name = args.name
    return benchmark, options


def main() -> None:
    """Run the benchmark that the command line names."""
    benchmark, options = parse(sys.argv[1:])
    try:
        print(run(benchmark, options))
    except Exception as error:
        if not is_for_the_user(error):
            raise
        sys.exit(f"bench {options.name}: error: {explain(error)}")


def run(benchmark: ModuleType, options: argparse.Namespace) -> str:
    """Measure all cases and return the page as finally written."""
    device, page = choose_device(options.device), ""
    about = timing.facts(device) | {"rounds": options.rounds}
    rows: list[dict[str, Any]] = []
    for case in cases(benchmark, options):
        new = benchmark.measure(case, device, options.rounds)
        rows += new
        if new:
            lines = table([benchmark.cells(row) for row in rows])
            page = write(options.out, options.name, about, rows, lines)
            print(*lines[-len(new) :], sep="\n", flush=True)
    return f"\n{page}"


def cases(benchmark: ModuleType, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all combinations of the options' values."""
    together = getattr(benchmark, "TOGETHER", ())
    axes = {name: getattr(options, name) for name in benchmark.OPTIONS}
    axes |= {name: [axes[name]] for name in together}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def table(rows: list[dict[str, str]]) -> list[str]:
    """Format rows as a Markdown table, with columns of numbers aligned to the right."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in header] for row in rows]
    columns = zip(*cells, strict=True)
    align = ["r" if all(c.strip("*")[:1].isdigit() for c in col if c) else "l" for col in columns]
    return text.markdown_table([header, *cells], "".join(align))


def write(
    out: Path, name: str, about: dict[str, Any], rows: list[dict[str, Any]], lines: list[str]
) -> str:
    """Write NAME.json and NAME.md to the folder ``out`` and return the Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    head = f"{about['hardware']}; {versions}; commit {about['commit']}; `{about['command']}`"
    page = "\n".join([head, "", *lines]) + "\n"
    record = json.dumps({**about, "rows": rows}, indent=1) + "\n"
    write_texts({out / f"{name}.json": record, out / f"{name}.md": page})
    return page


if __name__ == "__main__":
    # Triton decides on import whether it compiles or interprets.
    os.environ.pop("TRITON_INTERPRET", None)
    main()
