"""Time attention by itself with every backend, and show which one `auto` takes.

A case is a map, key and value channels per head, and a batch size that gives all cases about the
same number of logits. Times are for forward plus backward, with gradients of all inputs; the
fastest is bold, and the others are given as multiples of it.
"""

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aaconv import attention_2d
from aaconv.backends import NAMES
from aaconv.functional import choose_backend, unavailable_reason
from benchmarks import timing

OPTIONS: dict[str, list[Any]] = {
    "size": [4, 8, 16, 32],
    "keys": [8, 20],
    "values": [2, 4, 8],
    "heads": [4],
    "dtype": ["float32"],
    "relative": ["yes"],
    "logits": [16e6],
}
CHOICES = {"dtype": ("float16", "bfloat16", "float32", "float64"), "relative": ("yes", "no")}
# Size of all logits in float32 above which a backend that stores them is left out.
MAX_BYTES = 2**30


def batch(case: dict[str, Any]) -> int:
    """Return the number of images with about the case's ``logits``; at most 256, as in training."""
    return min(256, max(1, round(case["logits"] / case["heads"] / case["size"] ** 4)))


def inputs(case: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Return queries, keys and values, laid out like a convolution's output, and any tables."""
    size, dtype = case["size"], getattr(torch, case["dtype"])
    tensors = [
        torch.randn(batch(case), case["heads"], c, size, size, device=device, dtype=dtype)
        for c in (case["keys"], case["keys"], case["values"])
    ]
    tensors = [t.permute(0, 1, 3, 4, 2) for t in tensors]
    if case["relative"] == "yes":
        tensors += [torch.randn(2 * size - 1, case["keys"], device=device) for _ in range(2)]
    return [t.requires_grad_() for t in tensors]


def measure(case: dict[str, Any], device: torch.device, count: int) -> list[dict[str, Any]]:
    """Return the case with the milliseconds of each available backend, and the choice of auto."""
    tensors = inputs(case, device)
    q = tensors[0]
    logits = q[..., 0].numel() * case["size"] ** 2
    names = [
        name
        for name in NAMES
        if unavailable_reason(name, device, q.dtype) is None
        and (name != "reference" or 4 * logits <= MAX_BYTES)
    ]
    out = attention_2d(*tensors)
    # Has the memory layout of the gradient that the next convolution passes back.
    direction = torch.randn_like(out.permute(0, 1, 4, 2, 3).contiguous()).permute(0, 1, 3, 4, 2)

    def both(name: str) -> object:
        return torch.autograd.grad(attention_2d(*tensors, backend=name), tensors, direction)

    times = timing.rounds({name: partial(both, name) for name in names}, device, count)
    fastest = min(times, key=lambda name: statistics.median(times[name]))
    nanoseconds = 1e6 * statistics.median(times[fastest]) / logits
    chosen = choose_backend(q, relative=case["relative"] == "yes")
    found = {"batch": len(q), "ms": times, "auto": chosen, "fastest": fastest}
    return [case | found | {"ns_per_logit": nanoseconds}]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The case, and a time for each backend."""
    names = ("keys", "values", "heads", "batch", "dtype", "auto")
    return {
        "map": f"{row['size']}x{row['size']}",
        "positions": row["relative"],
        **{name: str(row[name]) for name in names},
        "ns a logit": f"{row['ns_per_logit']:.2f}",
        **{f"{name} ms": _time(row, name) for name in NAMES if name in row["ms"]},
    }


def _time(row: dict[str, Any], name: str) -> str:
    times, fastest = row["ms"], row["fastest"]
    if name == fastest:
        return f"**{timing.spread(times[name])}**"
    return f"{timing.spread(times[name])}, {timing.ratio(times[name], times[fastest]):.2f} times"
