"""The trial of a backend: what passes, what fails, and what `auto` does after a failure."""

import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from aaconv import attention_2d, backends, functional, trial

from helpers import inputs, inputs_like, with_gradients


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Start without any trial, and let `auto` mean fused, as on a GPU."""
    monkeypatch.setattr(trial, "_passed", {})
    monkeypatch.setattr(trial, "any_failed", False)

    def choose(q, *, relative):
        return "fused" if relative and not trial.any_failed else "sdpa"

    monkeypatch.setattr(functional, "choose_backend", choose)
    monkeypatch.setattr(functional, "check_backend", lambda *_, **__: None)


@pytest.fixture
def calls(monkeypatch):
    """How often each backend has run; `replace` replaces the fused backend."""
    counts = {}

    def count(name, attend):
        def counted(*tensors):
            counts[name] = counts.get(name, 0) + 1
            return attend(*tensors)

        monkeypatch.setattr(backends.MODULES[name], "attend", counted)

    for name in ("sdpa", "reference"):
        count(name, backends.MODULES[name].attend)
    formula = trial.formula

    def counted_formula(*tensors):
        counts["formula"] = counts.get("formula", 0) + 1
        return formula(*tensors)

    monkeypatch.setattr(trial, "formula", counted_formula)
    counts["replace"] = lambda attend: count("fused", attend)
    counts["replace"](backends.MODULES["reference"].attend)
    return counts


def low(size=(3, 5), dtype=torch.bfloat16, **more):
    return inputs_like(inputs(size, 2, 8, 4, **more), dtype)


def test_a_right_one_is_tried_once_for_each_map_and_dtype(calls, caplog):
    for _ in range(3):
        attention_2d(*low())
    assert (calls["fused"], calls["formula"]) == (1 + 3, 2)
    attention_2d(*low(batch=5))  # another batch size needs no new trial
    assert calls["formula"] == 2
    attention_2d(*low((4, 5)))
    attention_2d(*low(dtype=torch.float16))
    assert calls["formula"] == 6
    assert "sdpa" not in calls
    assert not caplog.records


def off_by_a_tenth(*tensors):
    return backends.MODULES["sdpa"].attend(*tensors) * 1.1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.2


def wrong_gradient(q, *others):
    return backends.MODULES["reference"].attend(WrongGradient.apply(q), *others)


def not_finite(*tensors):
    return backends.MODULES["reference"].attend(*tensors) * float("nan")


def does_not_compile(*tensors):
    raise RuntimeError("ptxas fatal: no such target\nand more")


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (off_by_a_tenth, "the output is off by "),
        (wrong_gradient, "a gradient is off by "),
        (not_finite, "the output is off by nan"),
        (does_not_compile, "RuntimeError: ptxas fatal: no such target;"),
    ],
)
def test_a_wrong_one_is_named_once_and_not_used(attend, words, calls, caplog):
    calls["replace"](attend)
    expected = with_gradients(lambda *t: attention_2d(*t, backend="sdpa"), low())
    for size in ((3, 5), (3, 5), (4, 2)):
        got = with_gradients(attention_2d, low(size))
        if size == (3, 5):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("attention by backend fused: " + words)
    assert record.message.endswith("; 'sdpa' is used instead")
    assert "\n" not in record.message
    assert calls["fused"] == 1


def test_an_image_of_the_training_is_left_alone(calls):
    tensors = low()
    before = [t.detach().clone() for t in tensors]
    attention_2d(*tensors)
    assert all(t.grad is None for t in tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not attention_2d(*low((2, 2))).requires_grad
    nothing = [t[:0] if t.dim() == 5 else t for t in tensors]
    assert attention_2d(*nothing).shape[0] == 0


def test_the_first_call_may_be_a_checkpointed_one(calls, caplog):
    """Activation checkpointing hooks into saved tensors, which must not include the trial's."""
    tensors = low()
    out = checkpoint(attention_2d, *tensors, use_reentrant=False)
    got = torch.autograd.grad(out, tensors, torch.ones_like(out))
    out = attention_2d(*tensors, backend="reference")
    expected = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert list(trial._passed.values()) == [True]
    assert not caplog.records


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_the_first_call_may_be_without_gradients(calls, caplog, without):
    with without():
        attention_2d(*low())
        attention_2d(*(t.clone() for t in low((2, 3))))  # inference tensors
    assert list(trial._passed.values()) == [True, True]
    assert not caplog.records


def test_tensors_without_values_are_not_tried(calls):
    with FakeTensorMode() as mode:
        attention_2d(*(mode.from_tensor(t.detach()) for t in low()))
    assert not trial._passed
    assert "formula" not in calls


def test_a_compiled_graph_has_no_trial(calls):
    compiled = torch.compile(attention_2d, fullgraph=True, backend="eager")
    compiled(*(t.detach() for t in low()))
    assert not trial._passed
    assert "formula" not in calls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_fused_kernels_pass(scale, dtype):
    """Triton's interpreter has no bfloat16. The tables are float32, as in training."""
    pytest.importorskip("triton")
    tensors = inputs_like(inputs((7, 9), 2, 20, 2, scale=scale), dtype)
    tensors = [*tensors[:3], *(t.float() for t in tensors[3:])]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert trial.obstacle("fused", [t.to(device) for t in tensors]) is None


def test_of_large_maps_some_heads_are_tried(monkeypatch):
    seen = []
    monkeypatch.setattr(trial, "MAX_LOGITS", 2 * 15**2 + 1)
    monkeypatch.setattr(trial, "_results", lambda _, given: seen.append(given[0].shape) or given)
    trial.obstacle("sdpa", inputs((3, 5), 6, 4, 2))
    assert seen == [(1, 2, 3, 5, 4)] * 3
