"""Define the torch operations of the compiled backends, which refuse second derivatives."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Table = Tensor | None

_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? rel_h, Tensor? rel_w"
# Five tensors rather than a list, which torch could not batch.
_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor drel_h, Tensor drel_w)"


def define(
    backend: str,
    devices: Sequence[str],
    attend: Callable[..., tuple[Tensor, Tensor]],
    attend_backward: Callable[..., tuple[Tensor, ...]],
    empty_like: Callable[..., Tensor],
) -> None:
    """Define ``aaconv::BACKEND_attend`` and its backward pass, ``aaconv::BACKEND_attend_backward``.

    This does not use torch.library.custom_op, which imports the compiler, and triton with it, on
    the first call.

    Args:
        backend: name of the backend.
        devices: devices it runs on, "CPU" and/or "CUDA".
        attend: maps q, k, v and both tables to the outputs described in `empty_outputs`.
        attend_backward: maps the output's gradient, the inputs of ``attend`` and its outputs to the
            gradients described in `empty_gradients`.
        empty_like: returns an uninitialized tensor shaped like its first argument, with the dtype
            of the second; by default, the dtype in which ``attend_backward`` returns gradients.
    """
    forward, backward = f"aaconv::{backend}_attend", f"aaconv::{backend}_attend_backward"
    torch.library.define(forward, f"({_GIVEN}) -> (Tensor out, Tensor lse)")
    given = f"(Tensor grad, {_GIVEN}, Tensor out, Tensor lse)"
    torch.library.define(backward, f"{given} -> {_GRADIENTS}")
    torch.library.impl(forward, devices, attend)
    torch.library.impl(backward, devices, attend_backward)

    @torch.library.register_fake(forward)
    def _(q: Tensor, k: Tensor, v: Tensor, *_: Table) -> tuple[Tensor, Tensor]:
        return empty_outputs(empty_like, q, v)

    @torch.library.register_fake(backward)
    def _(grad: Tensor, *given: Table) -> tuple[Tensor, ...]:
        return empty_gradients(empty_like, *given[:5])

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Table, ...]:
        saved = ctx.saved_tensors
        gradients = getattr(torch.ops.aaconv, f"{backend}_attend_backward")(grad, *saved)
        pairs = zip(gradients, saved[:5], strict=True)
        return tuple(None if t is None else gradient.to(t.dtype) for gradient, t in pairs)

    torch.library.register_autograd(forward, differentiate, setup_context=_save)
    torch.library.register_autograd(backward, refuse_second(backend))


def empty_outputs(empty_like: Callable[..., Tensor], q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the output and, for each query, log2 of the sum of 2^logits; both in float32.

    A rounded output would make its inner products with its gradient too inexact for the backward
    pass: if one key has nearly all the weight, gradients of the logits are small differences.
    """
    return empty_like(v, torch.float32), q.new_empty(q.shape[:-1], dtype=torch.float32)


def empty_gradients(
    empty_like: Callable[..., Tensor], *given: Table
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the gradients of q, k, v and the tables; those of missing tables have no rows."""
    maps = [empty_like(t) for t in given[:3]]
    rows = [0 if table is None else table.shape[0] for table in given[3:]]
    tables = [maps[0].new_empty(count, maps[0].shape[-1]) for count in rows]
    return (*maps, *tables)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Table, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def refuse_second(backend: str) -> Callable[..., NoReturn]:
    """Return a double-backward function for ``backend`` whose error says what to use instead."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"backend={backend!r} cannot be differentiated twice; use backend='reference'"
        )

    return refuse
