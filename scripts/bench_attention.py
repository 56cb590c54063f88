"""Time attention by itself with every backend, and show which one `auto` takes.

    python scripts/bench_attention.py [--device cpu] [--sizes 4 8 16 32] [--keys 8 20]

A case is a map, key and value channels per head, and a batch of so many images that the case has
about as many logits as the others. Times are medians (minimum to maximum) of interleaved rounds,
forward and backward, with the gradients of everything; the fastest is bold. Writes
bench_attention.md and bench_attention.json.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aaconv import BACKENDS, attention_2d
from aaconv.functional import choose_backend, unavailable_reason
from reporting import timing
from training.device import choose_device

ROOT = Path(__file__).resolve().parent.parent
NAMES = tuple(name for name in BACKENDS if name != "auto")
# Of all logits in float32, above which a backend that holds them is left out.
MOST_BYTES = 2**30


def given(case: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Queries, keys and values as a convolution leaves them, and the tables if there are any."""
    size, dtype = case["size"], getattr(torch, case["dtype"])
    channels = (case["keys"], case["keys"], case["values"])
    tensors = [
        torch.randn(case["batch"], case["heads"], c, size, size, device=device, dtype=dtype)
        for c in channels
    ]
    tensors = [t.permute(0, 1, 3, 4, 2) for t in tensors]
    if case["relative"]:
        tensors += [torch.randn(2 * size - 1, case["keys"], device=device) for _ in range(2)]
    return [t.requires_grad_() for t in tensors]


def measure(case: dict[str, Any], device: torch.device, count: int) -> dict[str, Any]:
    """The case with the milliseconds of each backend that can be used, and auto's choice."""
    tensors = given(case, device)
    q = tensors[0]
    logits = case["batch"] * case["heads"] * case["size"] ** 4
    names = [
        name
        for name in NAMES
        if unavailable_reason(name, device, q.dtype, needs_grad=True) is None
        and (name != "reference" or 4 * logits <= MOST_BYTES)
    ]
    out = attention_2d(*tensors)
    # In memory as the convolution that follows leaves its gradient.
    direction = torch.randn_like(out.permute(0, 1, 4, 2, 3).contiguous()).permute(0, 1, 3, 4, 2)

    def both(name: str) -> object:
        return torch.autograd.grad(attention_2d(*tensors, backend=name), tensors, direction)

    steps = {name: partial(both, name) for name in names}
    times = timing.rounds(steps, device, count)
    chosen = choose_backend(q, relative=case["relative"])
    fastest = min(times, key=lambda name: statistics.median(times[name]))
    nanoseconds = 1e6 * statistics.median(times[fastest]) / logits
    return case | {"ms": times, "auto": chosen, "fastest": fastest, "ns_per_logit": nanoseconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the fastest backend's time is bold, and the others' are compared with it."""
    names = [name for name in NAMES if any(name in row["ms"] for row in rows)]
    header = ["map", "positions", "keys", "values", "heads", "batch", "dtype"]
    header += ["auto", "ns a logit", *(f"{name} ms" for name in names)]
    lines = []
    for row in rows:
        size = row["size"]
        cells = [f"{size}x{size}", "yes" if row["relative"] else "no"]
        cells += [str(row[key]) for key in ("keys", "values", "heads", "batch", "dtype")]
        cells += [row["auto"], f"{row['ns_per_logit']:.2f}"]
        best = statistics.median(row["ms"][row["fastest"]])
        for name in names:
            if name not in row["ms"]:
                cells.append("")
            elif name == row["fastest"]:
                cells.append(f"**{timing.spread(row['ms'][name])}**")
            else:
                times = statistics.median(row["ms"][name]) / best
                cells.append(f"{timing.spread(row['ms'][name])}, {times:.2f} times")
        lines.append(cells)
    return timing.markdown(header, lines, text_columns=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--keys", nargs="+", type=int, default=[8, 20], help="channels per head")
    parser.add_argument("--values", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--relative", nargs="+", choices=("yes", "no"), default=["yes"])
    parser.add_argument("--logits", type=float, default=16e6, help="of a case, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        # At most 256 images, as a training step has them.
        batch = min(256, max(1, round(arguments.logits / arguments.heads / size**4)))
        for keys in arguments.keys:
            for values in arguments.values:
                for dtype in arguments.dtypes:
                    for relative in arguments.relative:
                        case = {"size": size, "keys": keys, "values": values, "dtype": dtype}
                        case |= {"heads": arguments.heads, "batch": batch}
                        case |= {"relative": relative == "yes"}
                        rows.append(measure(case, device, arguments.rounds))
                        print(table(rows).splitlines()[-1], flush=True)
    about = timing.facts(device) | {"rounds": arguments.rounds}
    print(timing.write(arguments.out, "bench_attention", about, rows, table(rows)))


if __name__ == "__main__":
    main()
