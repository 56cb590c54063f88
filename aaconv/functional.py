"""Two-dimensional relative self-attention (Bello et al., ICCV 2019, equations 1 to 5).

This module checks the arguments and chooses the backend; `aaconv.backends` does the computation.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from aaconv import backends, trial
from aaconv.backends import reference

BACKENDS = ("auto", *backends.NAMES)


def attention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Compute multi-head attention over all positions of a map, with learned relative positions.

    For every head, this is ``softmax((Q K^T + S_H + S_W) / sqrt(dkh)) V`` with
    ``S_H[i, j] = q_i . rel_h[jy - iy + H - 1]`` and ``S_W[i, j] = q_i . rel_w[jx - ix + W - 1]``
    (Bello et al. 2019, equations 3 to 5), or plain attention without tables (equation 1).

    Args:
        q: unscaled queries, (B, Nh, H, W, dkh).
        k: keys, (B, Nh, H, W, dkh).
        v: values, (B, Nh, H, W, dvh).
        rel_h: embeddings of the row offsets -(H-1) .. H-1, (2H-1, dkh), shared by the heads.
        rel_w: embeddings of the column offsets -(W-1) .. W-1, (2W-1, dkh). Give both tables or
            neither.
        backend: how the result is computed; results differ only in rounding.
            ``"reference"`` materializes all logits, (B, Nh, HW, HW), in at least float32.
            ``"sdpa"`` appends the position bias to query and key as extra channels and calls
            ``scaled_dot_product_attention``, which stores no logits if it has a flash kernel.
            ``"tiled"`` computes the logits one tile at a time, in at least float32, and recomputes
            them in the backward pass; it has no second derivatives.
            ``"native"`` does the same in one kernel, compiled on first use; it needs a CPU and a
            C++ compiler, and computes in float32.
            ``"fused"`` adds the position bias inside this project's Triton kernels, which store no
            logits; it needs a GPU and has no second derivatives either.
            ``"auto"`` is the fastest one measured on a CPU; on a CUDA GPU it is ``"fused"``, which
            has not been timed, after a trial on one image; see `choose_backend`.
        dropout: probability of dropping each weight after the softmax; the others are divided by
            ``1 - dropout``. Above 0, ``"auto"`` means ``"reference"``, the only backend that holds
            all weights in memory.

    Returns:
        (B, Nh, H, W, dvh), in the dtype of ``v``.

    Raises:
        ValueError: if the shapes do not match, a dtype is not floating-point, ``backend`` is
            unknown, or it cannot be used with these tensors (see `unavailable_reason`), with
            dropout, or inside a transform of torch.func.

    torch's FlopCounterMode counts the FLOPs of the formula for every backend: while it is active,
    the reference runs.
    """
    check_backend_name(backend)
    check_dropout(dropout, backend)
    _check_shapes(q, k, v, rel_h, rel_w)
    if dropout:
        return reference.attend_with_dropout(q, k, v, rel_h, rel_w, dropout)
    given = (q, k, v) if rel_h is None or rel_w is None else (q, k, v, rel_h, rel_w)
    # During export, the number of elements is not known.
    if _is_counted() or (not _is_exported() and q.numel() == 0):
        backend = "reference"
    if is_transformed(*given):
        # Only the reference supports all of their derivatives and batching.
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"backend={backend!r} cannot be used inside transforms of torch.func or with "
                "forward-mode derivatives; use backend='auto'"
            )
        backend = "reference"
    if torch.jit.is_tracing() and backend == "tiled":
        raise ValueError("backend='tiled' cannot be traced; use backend='auto'")
    if backend == "auto":
        backend = choose_backend(q, relative=rel_h is not None)
        # The trial never runs inside a compiled graph.
        if backend == "fused" and not torch.compiler.is_compiling():
            backend = "fused" if trial.self_check("fused", given) else "sdpa"
    check_backend(backend, q.device, q.dtype)
    return backends.MODULES[backend].attend(q, k, v, rel_h, rel_w)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise a one-line ValueError if ``backend`` cannot be used with such tensors here."""
    reason = unavailable_reason(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"backend={backend!r} {reason}; use backend='auto'")


def check_backend_name(backend: str) -> None:
    """Raise a one-line ValueError unless ``backend`` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")


def check_dropout(dropout: float, backend: str) -> None:
    """Raise a one-line ValueError if ``dropout`` is invalid or ``backend`` does not support it."""
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be from 0 to below 1")
    if dropout and backend not in ("auto", "reference"):
        raise ValueError(
            f"backend={backend!r} does not support dropout={dropout}; use backend='auto'"
        )


def unavailable_reason(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why ``backend`` is unavailable ("needs a CUDA GPU, not the device cpu"), or None.

    Args:
        backend: one of BACKENDS.
        device: device of queries, keys and values.
        dtype: dtype of the queries passed to `attention_2d`; under autocast, autocast's dtype.

    Raises:
        ValueError: if ``backend`` is unknown.
    """
    check_backend_name(backend)
    if backend == "auto":
        return None
    return backends.MODULES[backend].unavailable_reason(device, dtype)


# Same effect as torch.compiler.assume_constant_result: a compiler calls the function instead of
# tracing it. The decorator itself would always import the compiler, and triton with it.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(q: Tensor, *, relative: bool) -> str:
    """Return the backend that ``"auto"`` means for these queries.

    On the CPU, this is "native" if it can be compiled: it was the fastest for all map sizes and
    channels measured (table in docs/benchmarks.md). Otherwise, forward plus backward, "tiled" takes
    half the time of "sdpa" on 32x32 maps, and on 8x8 maps "reference" is about as fast.

    On a GPU of compute capability 8.0 or higher, it is "fused", chosen by its instruction count: no
    backend has been timed on a GPU yet. `attention_2d` tries it out first, see `aaconv.trial`.
    Elsewhere, and during export (torch.export, torch.onnx, torch.jit.trace), it is "sdpa".
    """
    if _is_exported():
        return "sdpa"
    if q.device.type == "cuda" and relative and not trial.any_failed:
        return "sdpa" if unavailable_reason("fused", q.device, q.dtype) else "fused"
    if q.device.type != "cpu":
        return "sdpa"
    if unavailable_reason("native", q.device, q.dtype) is None:
        return "native"
    # A compiler would unroll the loop over tiles.
    if not relative or torch.compiler.is_compiling():
        return "sdpa"
    return "tiled" if q.shape[2] * q.shape[3] > 64 else "reference"


def _is_exported() -> bool:
    """Return whether torch.export, torch.onnx or torch.jit.trace is running."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _is_counted() -> bool:
    """Return whether torch's FlopCounterMode is active."""
    if torch.compiler.is_compiling():
        return False
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)


def is_transformed(*given: Tensor) -> bool:
    """Return whether a torch.func transform (vmap, grad, ...) or forward-mode AD is active.

    Always False inside a compiler, which resolves them itself.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in given)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
) -> None:
    if q.dim() != 5 or q.shape != k.shape or q.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            "q, k and v must be (B, Nh, H, W, channels per head) and agree in all but the last "
            f"dimension; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not t.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point type, not {t.dtype}")
    if (rel_h is None) != (rel_w is None):
        raise ValueError("rel_h and rel_w go together: give both or neither")
    height, width, dkh = q.shape[2:]
    for name, table, size in (("rel_h", rel_h, height), ("rel_w", rel_w, width)):
        if table is not None and table.shape != (2 * size - 1, dkh):
            raise ValueError(
                f"{name} must be {(2 * size - 1, dkh)} for a {height}x{width} map with "
                f"dkh={dkh}; got {tuple(table.shape)}"
            )
