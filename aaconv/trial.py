"""Try out the backend that `auto` chooses on a GPU, on one image per shape.

The fused kernels were written without access to a GPU. If they do not compile or their results
differ from the formula, `auto` logs a warning once and uses another backend.
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

# Allowed error relative to the formula's error in the same precision, for output and gradients.
ALLOWED = (3.0, 4.0)
# Plus this share of the largest value: weights recomputed from logits in the hundreds are inexact.
ALLOWED_OF_LARGEST = 1e-4
# The formula holds all logits, so the trial uses only as many heads as stay within this number.
MAX_LOGITS = 2**28

# Results of the trials, by everything they may depend on except the batch size.
_passed: dict[tuple[object, ...], bool] = {}
any_failed = False


def self_check(backend: str, given: Sequence[Tensor]) -> bool:
    """Return whether ``backend`` computes one image of ``given`` correctly; tried on first use.

    ``given`` are q, k and v as for `aaconv.attention_2d`, and both tables or none. Each new device,
    dtype or shape gets its own trial. After a failure, `auto` never chooses the backend again.
    """
    q = given[0]
    if isinstance(q, FakeTensor):  # has a shape but no values
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
    """Describe what ``backend`` gets wrong on the first image of ``given``; None if nothing.

    The error of output and gradients may be ALLOWED times the formula's error in the same
    precision, plus ALLOWED_OF_LARGEST times the largest value.
    """
    heads = max(1, MAX_LOGITS // (given[0].shape[2] * given[0].shape[3]) ** 2)
    given = [t.detach()[:1, :heads] if t.dim() == 5 else t.detach() for t in given]
    try:
        with _on_its_own(), without_autocast(given[0].device.type):
            got = _results(backends.MODULES[backend].attend, given)
            own = _results(formula, given)
            exact = _results(formula, [t.double() for t in given])
    except Exception as raised:  # compilers and drivers raise many types
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
    """Enable gradients even if the caller disabled them, and disable the caller's tensor hooks.

    With activation checkpointing's hooks, a backward pass of the trial would recompute its layer.
    """

    def keep(t: Tensor) -> Tensor:
        return t

    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(keep, keep):
        yield


def _results(attend: Attend, given: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of ``attend`` and the gradients of all inputs."""
    leaves = [t.clone().requires_grad_() for t in given]
    out = attend(*leaves[:3], *(leaves[3:] or (None, None)))
    direction = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, direction.reshape(out.shape).to(out.dtype))
    return [out.detach(), *gradients]
