"""The refusal of second derivatives, which no compiled or tiled backend has."""

from collections.abc import Callable
from typing import Any, NoReturn


def refuse_second(backend: str) -> Callable[..., NoReturn]:
    """A backward function for the backward pass of ``backend``: it names what to use instead."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"backend={backend!r} cannot be differentiated twice; use backend='reference'"
        )

    return refuse
