"""Time the layer's backends against a plain convolution and the published implementation.

Times are for forward and for forward plus backward; memory is the peak of the latter above what was
allocated before, each in a new process. "pad and reshape" is how public implementations arrange the
relative logits (Bello et al. 2019, figure 5); its results are the same, and it is the base of all
ratios. A backend that is unavailable here is listed with the reason.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aaconv import AugmentedConv
from aaconv.backends import NAMES
from aaconv.functional import unavailable_reason
from benchmarks import timing
from training.device import to_device

BASE = "pad and reshape"
METHODS = ("convolution", BASE, *NAMES)
LAYER = ("channels", "dk", "dv", "Nh")
OPTIONS: dict[str, list[Any]] = {
    "size": [8, 16, 32, 64],
    "batch": [1, 8],
    "dtype": ["float32"],
    "channels": [160],
    "dk": [160],
    "dv": [16],
    "Nh": [8],
    "channels_last": ["no"],
}
CHOICES = {"dtype": ("float16", "bfloat16", "float32"), "channels_last": ("yes", "no")}


class PadAndReshape(AugmentedConv):
    """The layer as public implementations compute it, relative logits by reshaping."""

    def _attend(self, x: Tensor) -> Tensor:
        assert self.attn_out is not None
        q, k, v, rel_h, rel_w = self.queries_keys_values(x)
        assert rel_h is not None
        assert rel_w is not None
        q = q * q.shape[-1] ** -0.5
        col_bias = _relative(q, rel_w)  # (B, N, H, W, W): by key column
        row_bias = _relative(q.transpose(2, 3), rel_h).transpose(2, 3)
        relative = row_bias[..., None] + col_bias[..., None, :]
        logits = torch.matmul(q.flatten(2, 3), k.flatten(2, 3).mT)
        weights = torch.softmax(logits + relative.reshape(logits.shape), dim=-1)
        out = torch.matmul(weights, v.flatten(2, 3)).unflatten(2, q.shape[2:4])
        return self.attn_out(out.permute(0, 1, 4, 2, 3).flatten(1, 2))


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
    kind = PadAndReshape if method == BASE else AugmentedConv
    backend = method if method in NAMES else "auto"
    torch.manual_seed(0)
    return kind(channels, channels, 3, dk, dv, Nh, size, True, backend=backend)


def prepare(case: dict[str, Any], device: torch.device) -> tuple[Tensor, nn.Module]:
    """The input and the layer of the case and its method."""
    layer = build(case["method"], case["size"], *(case[name] for name in LAYER))
    x = torch.randn(case["batch"], case["channels"], case["size"], case["size"], device=device)
    channels_last = case["channels_last"] == "yes"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout).requires_grad_()
    return x, to_device(layer, device, channels_last)


def run(
    layer: nn.Module, x: Tensor, dtype: torch.dtype, backward: bool
) -> Callable[[], list[Tensor]]:
    """Return a function that computes the output and, if ``backward``, all gradients."""
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(backward), autocast:
            out = layer(x)
        if not backward:
            return [out]
        loss = out.float().square().mean()
        return [out.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]

    return step


def whole_pass(case: dict[str, Any], device: torch.device) -> Callable[[], list[Tensor]]:
    """Return the pass whose memory is measured, after running a small one.

    Libraries allocate memory of their own when they are first used.
    """
    x, layer = prepare(case, device)
    small, little = prepare(case | {"batch": 1, "size": 4}, device)
    run(little, small, _dtype(case), backward=True)()
    return run(layer, x, _dtype(case), backward=True)


def _dtype(case: dict[str, Any]) -> torch.dtype:
    return getattr(torch, case["dtype"])


def fits(case: dict[str, Any], device: torch.device) -> bool:
    """Whether five times the method's logits fit into free GPU memory, or half of the RAM."""
    if case["method"] not in (BASE, "reference"):
        return True
    needed = 5 * case["batch"] * case["Nh"] * case["size"] ** 4 * 4
    if device.type == "cuda":
        return needed < torch.cuda.mem_get_info(device)[0]
    return needed < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def skip_reason(case: dict[str, Any], device: torch.device) -> str | None:
    """Return why the method cannot be measured, in words, or None."""
    reason = None
    if case["method"] in NAMES:
        reason = unavailable_reason(case["method"], device, _dtype(case))
    return reason or (None if fits(case, device) else "does not fit into memory")


def measure(case: dict[str, Any], device: torch.device, count: int) -> list[dict[str, Any]]:
    """Return a row for each method: its times and memory in this case, or why it has none."""
    rows = {method: {"method": method, **case} for method in METHODS}
    for row in rows.values():
        reason = skip_reason(row, device)
        if reason is not None:
            row["obstacle"] = reason
    measured = [method for method in METHODS if "obstacle" not in rows[method]]
    prepared = {method: prepare(rows[method], device) for method in measured}
    x, layer = prepared["sdpa"]
    expected = layer(x)
    for method in measured:
        if method != "convolution":  # every other method computes the same
            out = prepared[method][1](x)
            assert (out - expected).abs().max() < 1e-3 * expected.abs().max(), method
    for backward in (False, True):
        steps = {m: run(layer, x, _dtype(case), backward) for m, (x, layer) in prepared.items()}
        for method, times in timing.rounds(steps, device, count).items():
            rows[method]["both_ms" if backward else "forward_ms"] = times
    for method in measured:
        rows[method]["peak_mib"] = timing.peak(whole_pass, rows[method], device)
    base = rows[BASE]
    for method in measured if BASE in measured else ():
        row = rows[method]
        row["time_ratio"] = timing.ratio(row["both_ms"], base["both_ms"])
        if base["peak_mib"] > 0:  # a small map may fit into memory that the process already had
            row["memory_ratio"] = row["peak_mib"] / base["peak_mib"]
    return list(rows.values())


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The case, and times and memory, or why there are none."""
    found = {
        "map": f"{row['size']}x{row['size']}",
        "batch": str(row["batch"]),
        "dtype": row["dtype"],
        "method": row["method"],
    }
    if "obstacle" in row:
        return found | {"forward ms": row["obstacle"]}
    return found | {
        "forward ms": timing.spread(row["forward_ms"]),
        "forward + backward ms": timing.spread(row["both_ms"]),
        "time ratio": f"{row['time_ratio']:.2f}" if "time_ratio" in row else "",
        "peak MiB": f"{row['peak_mib']:.0f}",
        "memory ratio": f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
    }
