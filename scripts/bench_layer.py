"""Time the layer's backends against a plain convolution and the published implementation.

    python scripts/bench_layer.py [--device cpu] [--sizes 8 16 32 64] [--channels-last]

Times are medians (minimum to maximum) of interleaved rounds, forward and forward plus backward.
Memory is the peak above what was allocated before, each measured in a new process. "pad and
reshape" is how public implementations arrange the relative logits (Bello et al. 2019, figure 5);
its results are the same. A backend that is unavailable here is listed with the reason. Writes
bench_layer.md and bench_layer.json.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aaconv import BACKENDS, AugmentedConv
from aaconv.functional import unavailable_reason
from reporting import timing
from training.device import choose_device, peak_memory_mib

ROOT = Path(__file__).resolve().parent.parent

Step = Callable[[], Tensor]
METHODS = ("convolution", "pad and reshape", *(b for b in BACKENDS if b != "auto"))


class PadAndReshape(AugmentedConv):
    """The layer as public implementations compute it, relative logits by reshaping."""

    def _attend(self, x: Tensor) -> Tensor:
        assert self.qkv_conv is not None
        assert self.attn_out is not None
        assert self.key_rel_h is not None
        assert self.key_rel_w is not None
        down, right = self.subsample
        qkv = self.qkv_conv(x[:, :, ::down, ::right])
        B, _, H, W = qkv.shape
        q, k, v = qkv.split((self.dk, self.dk, self.dv), dim=1)
        q = q * (self.dk // self.Nh) ** -0.5
        q, k, v = (t.reshape(B, self.Nh, -1, H, W) for t in (q, k, v))
        logits = torch.matmul(q.flatten(3).transpose(2, 3), k.flatten(3))
        q = q.permute(0, 1, 3, 4, 2)
        col_bias = _relative(q, self.key_rel_w)  # (B, N, H, W, W): by key column
        row_bias = _relative(q.transpose(2, 3), self.key_rel_h).transpose(2, 3)
        relative = row_bias[..., None] + col_bias[..., None, :]
        weights = torch.softmax(logits + relative.reshape(B, self.Nh, H * W, H * W), dim=-1)
        out = torch.matmul(weights, v.flatten(3).transpose(2, 3))
        return self.attn_out(out.transpose(2, 3).reshape(B, self.dv, H, W))


def _relative(q: Tensor, table: Tensor) -> Tensor:
    """(B, N, H, W, D) and (2W-1, D) to (B, N, H, W, W), by padding and reshaping."""
    B, N, H, W, _ = q.shape
    logits = torch.matmul(q, table.t().to(q.dtype)).flatten(1, 2)  # (B, N H, W, 2W-1)
    flat = F.pad(logits, (0, 1)).flatten(2)
    flat = F.pad(flat, (0, W - 1)).reshape(B, N * H, W + 1, 2 * W - 1)
    return flat[:, :, :W, W - 1 :].reshape(B, N, H, W, W)


def build(method: str, size: int, channels: int, dk: int, dv: int, Nh: int) -> nn.Module:
    """The layer, or the plain convolution that it replaces."""
    if method == "convolution":
        return nn.Conv2d(channels, channels, 3, padding=1)
    kind = PadAndReshape if method == "pad and reshape" else AugmentedConv
    backend = method if method in BACKENDS else "auto"
    torch.manual_seed(0)
    return kind(channels, channels, 3, dk, dv, Nh, size, True, backend=backend)


def step(layer: nn.Module, x: Tensor, dtype: torch.dtype, backward: bool) -> Step:
    """One pass through the layer, with the gradients of input and parameters if ``backward``."""

    def forward() -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return layer(x)

    def both() -> Tensor:
        layer.zero_grad()
        x.grad = None
        out = forward()
        out.float().square().mean().backward()
        return out.detach()

    def only_forward() -> Tensor:
        with torch.no_grad():
            return forward()

    return both if backward else only_forward


def peak(method: str, case: dict[str, Any], device_name: str) -> float:
    """Peak MiB of forward plus backward above the layer and its input, in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (method, case, device_name))


def _peak_here(method: str, case: dict[str, Any], device_name: str) -> float:
    device = torch.device(device_name)
    x, layer = _prepare(method, case, device)
    # A small pass first: libraries allocate memory of their own when they are first used.
    small, little = _prepare(method, case | {"batch": 1, "size": 4}, device)
    step(little, small, _dtype(case), backward=True)()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
    else:
        before = peak_memory_mib(device)
    step(layer, x, _dtype(case), backward=True)()
    return peak_memory_mib(device) - before


def _prepare(method: str, case: dict[str, Any], device: torch.device) -> tuple[Tensor, nn.Module]:
    channels, size = case["channels"], case["size"]
    layer = build(method, size, channels, case["dk"], case["dv"], case["Nh"]).to(device)
    x = torch.randn(case["batch"], channels, size, size, device=device)
    if case["channels_last"]:
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), layer


def _dtype(case: dict[str, Any]) -> torch.dtype:
    return getattr(torch, case["dtype"])


def _fits(method: str, case: dict[str, Any], device: torch.device) -> bool:
    """Whether five times the method's logits fit into free GPU memory, or half of the RAM."""
    if method not in ("pad and reshape", "reference"):
        return True
    logits = case["batch"] * case["Nh"] * case["size"] ** 4 * 4
    if device.type == "cuda":
        return 5 * logits < torch.cuda.mem_get_info(device)[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 5 * logits < memory / 2


def _obstacle(method: str, case: dict[str, Any], device: torch.device) -> str | None:
    """Why the method cannot be measured, in words, or None."""
    if method in BACKENDS:
        reason = unavailable_reason(method, device, _dtype(case), needs_grad=True)
        if reason is not None:
            return reason
    return None if _fits(method, case, device) else "does not fit into memory"


def measure(case: dict[str, Any], device: torch.device, count: int) -> list[dict[str, Any]]:
    """A row for each method: its times and memory in this case, or why it has none."""
    obstacles = {method: _obstacle(method, case, device) for method in METHODS}
    methods = [method for method in METHODS if obstacles[method] is None]
    prepared = {method: _prepare(method, case, device) for method in methods}
    x, layer = prepared["sdpa"]
    expected = layer(x)
    for method in methods:
        if method != "convolution":  # every other method computes the same
            out = prepared[method][1](x)
            assert (out - expected).abs().max() < 1e-3 * expected.abs().max(), method
    times = {}
    for backward in (False, True):
        steps = {m: step(layer, x, _dtype(case), backward) for m, (x, layer) in prepared.items()}
        times[backward] = timing.rounds(steps, device, count)
    rows = []
    for method in METHODS:
        if method not in methods:
            rows.append({"method": method, **case, "obstacle": obstacles[method]})
            continue
        row = {
            "method": method,
            **case,
            "forward_ms": times[False][method],
            "both_ms": times[True][method],
        }
        rows.append(row | {"peak_mib": peak(method, case, str(device))})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with time and memory of each method as a ratio to "pad and reshape"."""
    header = ["map", "batch", "dtype", "method", "forward ms", "forward + backward ms"]
    header += ["time ratio", "peak MiB", "memory ratio"]
    lines = []
    for row in rows:
        cells = [f"{row['size']}x{row['size']}", str(row["batch"]), row["dtype"], row["method"]]
        if "obstacle" in row:
            lines.append([*cells, row["obstacle"], *[""] * 4])
            continue
        base = next(
            r
            for r in rows
            if r["method"] == "pad and reshape"
            and all(r[k] == row[k] for k in ("size", "batch", "dtype"))
        )
        cells += [timing.spread(row["forward_ms"]), timing.spread(row["both_ms"])]
        cells += [_ratio(row, base, "both_ms"), f"{row['peak_mib']:.0f}"]
        lines.append([*cells, _ratio(row, base, "peak_mib")])
    return timing.markdown(header, lines, text_columns=4)


def _ratio(row: dict[str, Any], base: dict[str, Any], key: str) -> str:
    if key not in base:
        return ""
    ours, theirs = (
        statistics.median(r[key]) if isinstance(r[key], list) else r[key] for r in (row, base)
    )
    # A small map may fit into memory that the process already had.
    return f"{ours / theirs:.2f}" if theirs > 0 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--channels", type=int, default=160)
    parser.add_argument("--dk", type=int, default=160)
    parser.add_argument("--dv", type=int, default=16)
    parser.add_argument("--Nh", type=int, default=8)
    parser.add_argument("--channels-last", action="store_true", help="as training has them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    layer = {k: getattr(arguments, k) for k in ("channels", "dk", "dv", "Nh")}
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for batch in arguments.batches:
            for dtype in arguments.dtypes:
                case = {"size": size, "batch": batch, "dtype": dtype, **layer}
                case["channels_last"] = arguments.channels_last
                rows += measure(case, device, arguments.rounds)
                print(*table(rows).splitlines()[-len(METHODS) :], sep="\n", flush=True)
    about = timing.facts(device) | {"layer": layer, "rounds": arguments.rounds}
    print(timing.write(arguments.out, "bench_layer", about, rows, table(rows)))


if __name__ == "__main__":
    main()
