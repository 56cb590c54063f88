"""A backend that `auto` chooses on a GPU is tried on one image first, for each shape.

The fused kernels were written without a GPU at hand. Where they do not compile, or compute
something else than the formula, `auto` says so once and takes another backend.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from aaconv import backends
from aaconv.backends.precision import Attend, without_autocast
from aaconv.backends.reference import formula

log = logging.getLogger(__name__)

# How much more than the formula in the same precision a backend may err: the output, gradients.
ALLOWED = (3.0, 4.0)
# And of the largest value: weights that are recomputed from logits of hundreds are a little off.
ALLOWED_OF_LARGEST = 1e-4
# The formula holds all logits, of as many heads as make no more than this.
MAX_LOGITS = 2**28

# What came of it, by everything that it may depend on but the batch.
_passed: dict[tuple[object, ...], bool] = {}
any_failed = False


def self_check(backend: str, given: Sequence[Tensor]) -> bool:
    """Whether ``backend`` has computed one image of ``given`` right; tried at the first call.

    ``given`` are q, k and v as for `aaconv.attention_2d`, and both tables or none. Another device,
    dtype or map is another trial. After one has failed `auto` does not choose the backend again.
    """
    q = given[0]
    if isinstance(q, FakeTensor):  # which has a shape and no values
        return True
    shapes = tuple(tuple(t.shape[1:]) for t in given)
    key = (backend, q.device, q.dtype, shapes, q.stride(-1) == 1)
    if key not in _passed:
        why = obstacle(backend, given)
        _passed[key] = why is None
        if why is not None:
            global any_failed
            any_failed = True
            log.warning("attention by backend %s: %s; 'sdpa' is used instead", backend, why)
    return _passed[key]


def obstacle(backend: str, given: Sequence[Tensor]) -> str | None:
    """What ``backend`` does wrong on the first image of ``given``, in words, or None.

    Output and gradients may err by ALLOWED times what the formula errs by in the same precision,
    and by ALLOWED_OF_LARGEST of the largest value.
    """
    heads = max(1, MAX_LOGITS // (given[0].shape[2] * given[0].shape[3]) ** 2)
    given = [t.detach()[:1, :heads] if t.dim() == 5 else t.detach() for t in given]
    try:
        with _on_its_own(), without_autocast(given[0].device.type):
            got = _results(backends.MODULES[backend].attend, given)
            own = _results(formula, given)
            exact = _results(formula, [t.double() for t in given])
    except Exception as raised:  # a compiler's or a driver's, of any type
        said = str(raised).strip().splitlines()
        return f"{type(raised).__name__}{': ' + said[0] if said else ''}"
    for index, (a, b, e) in enumerate(zip(got, own, exact, strict=True)):
        size = e.abs().max()
        error, errs = ((t.double() - e).abs().max() for t in (a, b))
        if not error <= ALLOWED[index > 0] * errs + ALLOWED_OF_LARGEST * size:
            what = "the output" if index == 0 else "a gradient"
            return f"{what} is off by {error:.2g}, by the formula in the same precision {errs:.2g}"
    return None


@contextmanager
def _on_its_own() -> Iterator[None]:
    """With gradients whatever the caller computes without, and none of its hooks.

    Activation checkpointing has such hooks: a backward pass of the trial would recompute its layer.
    """

    def keep(t: Tensor) -> Tensor:
        return t

    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(keep, keep):
        yield


def _results(attend: Attend, given: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of everything given."""
    leaves = [t.clone().requires_grad_() for t in given]
    out = attend(*leaves[:3], *(leaves[3:] or (None, None)))
    direction = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, direction.reshape(out.shape).to(out.dtype))
    return [out.detach(), *gradients]
