"""`attention_2d`: every backend against the pair-by-pair formula."""

import inspect
import re
import shutil
import subprocess
import sys
import tarfile
from functools import cache

import pytest
import torch

from aaconv import BACKENDS, attention_2d, backends
from aaconv.backends import native_build
from aaconv.functional import check_backend, choose_backend, unavailable_reason

import reference
from helpers import (
    CASES,
    ROOT,
    assert_rounded,
    direction_of,
    inputs,
    inputs_like,
    rounding_errors,
    usable,
    with_gradients,
)


def case(size, heads, dkh, dvh, relative):
    tensors = inputs(size, heads, dkh, dvh, batch=1 if size == (7, 13) else 2)
    return tensors if relative else tensors[:3]


@cache  # the same for every backend, and slow
def by_formula(*arguments):
    return [t.detach() for t in with_gradients(reference.attention, case(*arguments))]


@pytest.mark.parametrize("backend", usable(torch.float64))
@pytest.mark.parametrize(("size", "heads", "dkh", "dvh"), CASES)
@pytest.mark.parametrize("relative", [True, False])
def test_equals_the_formula_with_gradients(backend, size, heads, dkh, dvh, relative):
    arguments = (size, heads, dkh, dvh, relative)
    got = with_gradients(lambda *t: attention_2d(*t, backend=backend), case(*arguments))
    for a, b in zip(got, by_formula(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tile_bytes", [1, 8 * 17, 8 * 21 * 5, 8 * 2 * 21**2, 8 * 5 * 21**2])
def test_tiles_of_any_size_cover_all(monkeypatch, tile_bytes):
    """Tiles range from one query over uneven parts of a head to several heads."""
    monkeypatch.setattr("aaconv.backends.tiled.TILE_BYTES", tile_bytes)
    tensors = inputs((3, 7), 3, 5, 2)
    expected = with_gradients(lambda *t: attention_2d(*t, backend="reference"), tensors)
    got = with_gradients(lambda *t: attention_2d(*t, backend="tiled"), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def in_float64(tensors):
    """Compute in float64 with the vectorized formula, which is checked above."""
    tensors = inputs_like(tensors, torch.float64)
    return with_gradients(lambda *t: attention_2d(*t, backend="reference"), tensors)


def inner(backend, dtype):
    """The dtype that a backend rounds the weights to; most compute in float32 for any input."""
    return dtype if backend in ("sdpa", "fused") else torch.float32


@pytest.mark.parametrize("backend", [b for b in usable(torch.float32) if b != "auto"])
def test_gradients_taken_inside_autocast(backend):
    tensors = inputs_like(inputs((3, 5), 2, 4, 3, torch.bfloat16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(lambda *t: attention_2d(*t, backend=backend), tensors)
    # The tiled backward pass disables autocast; the operations after it, for q, do not.
    rounded = {"reference": (1, 2, 3, 4, 5), "sdpa": range(6), "tiled": (1, 4, 5)}.get(backend, ())
    outside, inside = (rounding_errors(tensors, d) for d in (torch.float32, torch.bfloat16))
    errors = [(inside if index in rounded else outside)[index] for index in range(6)]
    assert_rounded(got, in_float64(tensors), errors)


@pytest.mark.parametrize("scale", [1.0, 2.5, 8.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("auto", "fused")])
def test_the_backend_chooses_how_and_never_what(backend, dtype, scale):
    """With logits up to 242, errors in half precision are within the rounding bounds."""
    low = inputs_like(inputs((7, 5), 3, 20, 4, scale=scale), dtype)
    got = with_gradients(lambda *t: attention_2d(*t, backend=backend), low)
    assert_rounded(got, in_float64(low), rounding_errors(low, inner(backend, dtype)))


@pytest.mark.parametrize("backend", ["auto", *usable(torch.float32)])
def test_values_may_be_of_a_wider_dtype(backend):
    tensors = inputs((3, 5), 2, 8, 4)
    mixed = [t if t is tensors[2] else t.float() for t in tensors]
    out = attention_2d(*mixed, backend=backend)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, attention_2d(*tensors), rtol=0, atol=1e-5)


# Warnings of Triton's interpreter; a GPU does not warn.
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
@pytest.mark.parametrize("backend", usable(torch.float16))
def test_large_logits_in_fp16_stay_finite(backend):
    """Logits and position terms up to 1e6 exceed fp16's 65504, but are harmless in float32."""
    tensors = inputs((3, 5), 2, 8, 4, torch.float32, scale=300.0)
    tensors = [t.detach() * 300 if index > 2 else t.detach() for index, t in enumerate(tensors)]
    low = [t.half().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.float16):
        out, *gradients = with_gradients(lambda *t: attention_2d(*t, backend=backend), low)
    assert out.dtype == torch.float16
    errors = rounding_errors(low, inner(backend, torch.float16))
    assert_rounded([out], in_float64(low)[:1], errors[:1])
    assert all(g.isfinite().all() for g in gradients)


def test_only_positions_distinguish_pixels():
    """Permuting the pixels permutes the output only if there are no positions."""
    q, k, v, rel_h, rel_w = (t.detach() for t in inputs((5, 3), 2, 3, 4))
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))

    def shuffled(t):
        return t.flatten(2, 3)[:, :, order].unflatten(2, (5, 3))

    plain = attention_2d(shuffled(q), shuffled(k), shuffled(v))
    torch.testing.assert_close(plain, shuffled(attention_2d(q, k, v)))
    relative = attention_2d(shuffled(q), shuffled(k), shuffled(v), rel_h, rel_w)
    assert (relative - shuffled(attention_2d(q, k, v, rel_h, rel_w))).abs().max() > 0.1


@pytest.mark.parametrize("backend", usable(torch.float32))
@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
def test_nothing_to_attend(shape, backend):
    q, k = torch.randn(2, *shape, 4).unbind()
    v = torch.randn(*shape, 3, requires_grad=True)
    out = attention_2d(q, k, v, backend=backend)
    assert out.shape == (*shape, 3)
    out.sum().backward()
    assert v.grad.shape == v.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (2, 2, 5, 3, 4)}, r"\(2, 2, 5, 3, 4\)"),
        ({"v": (2, 2, 3, 5, 4)}, r"\(2, 2, 3, 5, 4\)"),
        ({"q": (2, 5, 3, 3), "k": (2, 5, 3, 3), "v": (2, 5, 3, 3)}, r"must be \(B, Nh, H, W"),
        ({"rel_h": (8, 3)}, r"rel_h must be \(9, 3\).*5x3.*got \(8, 3\)"),
        ({"rel_w": (5, 2)}, r"rel_w must be \(5, 3\)"),
        ({"rel_w": None}, "give both or neither"),
        ({"backend": "fast"}, "backend='fast' is unknown; choose one of auto, reference"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    shapes = {
        "q": (2, 2, 5, 3, 3),
        "k": (2, 2, 5, 3, 3),
        "v": (2, 2, 5, 3, 4),
        "rel_h": (9, 3),
        "rel_w": (5, 3),
        "backend": "auto",
    }
    arguments = {
        name: torch.zeros(value) if isinstance(value, tuple) else value
        for name, value in (shapes | change).items()
    }
    with pytest.raises(ValueError, match=words):
        attention_2d(**arguments)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "reason"),
    [
        ("fused", "cuda", torch.float64, "needs float32, bfloat16 or float16, not float64"),
        ("fused", "cpu", torch.bfloat16, "needs a CUDA GPU, not the device cpu"),
        ("fused", "meta", torch.float16, "needs a CUDA GPU, not the device meta"),
        (
            "fused",
            "cuda",
            torch.float32,
            "needs a GPU of compute capability 8.0 or higher, not 7.5",
        ),
        ("native", "meta", torch.float32, "needs the CPU, not the device meta"),
        ("native", "cpu", torch.float64, "needs float32, bfloat16 or float16, not float64"),
    ],
)
def test_why_a_backend_is_unavailable(backend, device, dtype, reason, monkeypatch):
    if backend == "fused":
        pytest.importorskip("triton")
        monkeypatch.setattr("aaconv.backends.fused_ops.INTERPRETED", False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    device = torch.device(device)
    assert unavailable_reason(backend, device, dtype) == reason
    words = re.escape(f"backend='{backend}' {reason}; use backend='auto'")
    with pytest.raises(ValueError, match=f"^{words}$"):
        check_backend(backend, device, dtype)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_floating_point_numbers_attend(dtype, backend):
    given = [t.detach() for t in inputs((1, 2), 1, 2, 2)]
    for index, name in enumerate("qkv"):
        mixed = [t.to(dtype) if i == index else t for i, t in enumerate(given)]
        with pytest.raises(ValueError, match=f"^{name} must be of a floating-point type, not "):
            attention_2d(*mixed, backend=backend)


# torch's own warning about operations that it vectorizes here.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("backend", ["auto", *usable(torch.float32)])
@pytest.mark.parametrize("count", [3, 5])
def test_batched_gradients_are_those_of_each(backend, count):
    """These are used by torch.autograd.functional.jacobian(vectorize=True)."""
    given = inputs_like(inputs((3, 2), 2, 4, 3)[:count], torch.float32)
    out = attention_2d(*given, backend=backend)
    directions = torch.stack([direction_of(out), -2 * direction_of(out), out.detach()])
    if backend == "tiled":
        words = "backend='tiled' cannot be used with is_grads_batched; use backend='reference'"
        with pytest.raises(NotImplementedError, match=f"^{words}$"):
            torch.autograd.grad(out, given, directions, is_grads_batched=True)
        return
    got = torch.autograd.grad(out, given, directions, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, given, d, retain_graph=True) for d in directions]
    for a, b in zip(got, map(torch.stack, zip(*each, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


def test_fused_without_triton(monkeypatch):
    monkeypatch.setattr("aaconv.backends.fused.HAS_TRITON", False)
    cuda = torch.device("cuda")
    reason = unavailable_reason("fused", cuda, torch.float32)
    assert reason == "needs the package triton"
    tensors = inputs((1, 2), 1, 2, 2)
    with pytest.raises(ValueError, match=r"backend='fused' needs .*; use backend='auto'"):
        attention_2d(*tensors, backend="fused")
    for other in ("auto", "reference", "sdpa", "tiled"):
        assert unavailable_reason(other, cuda, torch.float16) is None


@pytest.mark.parametrize("name", BACKENDS[1:])
def test_every_backend_has_the_same_two_functions(name):
    for function in ("attend", "unavailable_reason"):
        _, *expected = inspect.signature(getattr(backends.Backend, function)).parameters.values()
        signature = inspect.signature(getattr(backends.MODULES[name], function))
        assert list(signature.parameters.values()) == expected


@pytest.mark.parametrize(
    ("size", "device", "relative", "expected"),
    [
        ((8, 8), "cpu", True, "native"),
        ((5, 13), "cpu", False, "native"),
        ((5, 13), "meta", True, "sdpa"),
        ((8, 8), "meta", True, "sdpa"),
    ],
)
def test_auto(size, device, relative, expected):
    q = torch.empty(2, 3, *size, 4, device=device)
    assert choose_backend(q, relative=relative) == expected


@pytest.mark.parametrize(
    ("size", "relative", "expected"),
    [
        ((8, 8), True, "reference"),
        ((5, 13), True, "tiled"),
        ((5, 13), False, "sdpa"),
        ((8, 8), False, "sdpa"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_without_the_compiled_kernel(size, relative, expected, dtype, monkeypatch):
    """The kernel supports float32 and lower precisions, and may be unavailable."""
    if dtype == torch.float32:
        error = native_build.UnavailableError("was not compiled")
        monkeypatch.setattr(native_build, "load", lambda: error)
    assert choose_backend(torch.empty(2, 3, *size, 4, dtype=dtype), relative=relative) == expected


@pytest.mark.slow
def test_triton_is_not_imported_before_it_is_used():
    """Importing it is slow, and not every platform has it."""
    program = """
import sys, torch
from aaconv import AugmentedConv
for backend in ("auto", "reference", "sdpa", "tiled", "native"):
    layer = AugmentedConv(3, 8, 3, 4, 4, 2, (3, 5), True, backend=backend)
    layer(torch.randn(2, 3, 3, 5)).sum().backward()
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_package_is_installed_whole():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / "aaconv"
    folders = {path.parent.relative_to(ROOT) for path in folder.rglob("*.py")}
    assert {".".join(path.parts) for path in folders} == set(settings["packages"])
    assert native_build.SOURCE.relative_to(folder).as_posix() in settings["package-data"]["aaconv"]


def test_the_source_distribution_has_its_tests(tmp_path):
    """It has everything in a clone except for development files."""
    left_out = [".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "datasets", "wandb"]
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*left_out))
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (archive,) = tmp_path.glob("aaconv-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    files = {str(path.relative_to(clone)) for path in clone.rglob("*") if path.is_file()}
    assert {name for name in files - packed if ".egg-info" not in name} == set()
    assert "tests/test_layer.py" in packed
