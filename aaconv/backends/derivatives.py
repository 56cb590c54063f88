"""First derivatives of the compiled backends, and the refusal of second ones."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor


def refuse_second(backend: str) -> Callable[..., NoReturn]:
    """A backward function for the backward pass of ``backend``: it names what to use instead."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"backend={backend!r} cannot be differentiated twice; use backend='reference'"
        )

    return refuse


def save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep q, k, v, both tables, the output, and the logarithms of the softmax's sums."""
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def differentiate_by(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """A backward function of what `save` kept: ``backward`` has the gradients of all five."""

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        pairs = zip(backward(grad, *given), given[:5], strict=True)
        return tuple(None if t is None else gradient.to(t.dtype) for gradient, t in pairs)

    return differentiate
