"""The torch operations of the compiled backends, and the refusal of second derivatives."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Table = Tensor | None

_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? rel_h, Tensor? rel_w"
# Five tensors and no list of them, which torch could not batch.
_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor drel_h, Tensor drel_w)"


def define(
    backend: str,
    devices: Sequence[str],
    attend: Callable[..., tuple[Tensor, Tensor]],
    attend_backward: Callable[..., tuple[Tensor, ...]],
    empty_like: Callable[..., Tensor],
) -> None:
    """Define ``aaconv::BACKEND_attend`` and its backward pass, ``aaconv::BACKEND_attend_backward``.

    Not by torch.library.custom_op, which imports the compiler, and with it triton, at the first
    call.

    Args:
        backend: its name.
        devices: where its functions run, "CPU" or "CUDA".
        attend: q, k, v and both tables to what `empty_outputs` describes.
        attend_backward: the output's gradient, what ``attend`` was given, and what it has returned,
            to what `empty_gradients` describes.
        empty_like: uninitialized memory for maps like its argument, of the dtype given second; by
            default of that in which ``attend_backward`` returns gradients.
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
    """For the output, and for log2 of the sum of 2^logits of each query; both in float32.

    From a rounded output the inner products with its gradient would be wrong for the backward pass:
    where one key has nearly all the weight, the gradients of the logits are small differences.
    """
    return empty_like(v, torch.float32), q.new_empty(q.shape[:-1], dtype=torch.float32)


def empty_gradients(
    empty_like: Callable[..., Tensor], *given: Table
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For the gradients of q, k, v and the tables, of no rows without tables."""
    maps = [empty_like(t) for t in given[:3]]
    rows = [0 if table is None else table.shape[0] for table in given[3:]]
    tables = [maps[0].new_empty(count, maps[0].shape[-1]) for count in rows]
    return (*maps, *tables)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Table, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def refuse_second(backend: str) -> Callable[..., NoReturn]:
    """A backward function for the backward pass of ``backend``: it names what to use instead."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"backend={backend!r} cannot be differentiated twice; use backend='reference'"
        )

    return refuse
