"""Programs exported with dynamic batch, height and width, on maps of various sizes."""

import itertools

import pytest
import torch
from torch import nn
from torch.export import Dim

from aaconv import AugmentedConv
from aaconv.tables import fit_table

from helpers import thorough

# Warnings from the exporters themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::torch.jit.TracerWarning",
)

# Batch, height and width; the tables are made for the output of a 16x13 image.
SIZES = [(2, 16, 13), (1, 16, 13), (3, 9, 11), (1, 7, 8), (2, 31, 29), (5, 8, 40)]
CASES = [
    {},
    {"stride": 2, "qk_norm": True},
    {"pool": 2},
    {"pool": 2, "stride": 2},
    {"relative": False, "absolute": "coord"},
    {"relative": False, "absolute": "sine"},
    {"relative": False, "shape": 0},
]


def build(change):
    torch.manual_seed(0)
    stride = change.get("stride", 1)
    usual = {"shape": (-(-16 // stride), -(-13 // stride)), "relative": True}
    return AugmentedConv(4, 12, 3, dk=8, dv=4, Nh=2, **usual | change).double().eval()


def images(size=SIZES[0]):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size[0], 4, *size[1:], dtype=torch.float64, generator=generator)


def check(run, layer, dtype=torch.float64):
    for size in SIZES:
        x = images(size).to(dtype)
        with torch.no_grad():
            expected = layer(x)
        # The same formula in another order: a few dozen roundings.
        error = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(run(x), expected, rtol=0, atol=error, msg=str(size))


@pytest.fixture
def free():
    return {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}


@pytest.mark.parametrize("change", [CASES[1], *map(thorough, CASES[3:])], ids=str)
def test_torch_export(change, free):
    layer = build(change)
    check(torch.export.export(layer, (images(),), dynamic_shapes=free).module(), layer)


class Together(nn.Module):
    """Several layers with one input, because exporting them together is faster."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(build(change) for change in (CASES[0], *CASES[3:5]))

    def forward(self, x):
        return torch.cat([layer(x).flatten(1) for layer in self.layers], dim=1)


@pytest.mark.thorough
def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    layers = Together().float()  # onnxruntime has no float64 convolutions
    names = {"x": {0: "batch", 2: "height", 3: "width"}}
    program = torch.onnx.export(
        layers, (images().float(),), dynamo=True, dynamic_shapes=names, verbose=False
    )
    program.save(tmp_path / "layers.onnx")
    session = runtime.InferenceSession(tmp_path / "layers.onnx")
    check(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), layers, torch.float32)


@pytest.mark.thorough
def test_ahead_of_time_inductor(tmp_path, free, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    layer = build({"stride": 2})
    program = torch.export.export(layer, (images(),), dynamic_shapes=free)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    check(torch._inductor.aoti_load_package(path), layer)


def test_a_backend_that_cannot_be_traced_is_named():
    layer = build({})
    layer.backend = "tiled"
    with pytest.raises(ValueError, match="backend='tiled' cannot be traced; use backend='auto'"):
        torch.jit.trace(layer, images())


def interpolated(table, length):
    """The former implementation: cut out rows, or use torch's linear interpolation."""
    rows = 2 * length - 1
    surplus = (len(table) - rows) // 2
    if surplus >= 0:
        return table[surplus : surplus + rows]
    resized = torch.nn.functional.interpolate(
        table.T[None], size=rows, mode="linear", align_corners=True
    )
    return resized[0].T


def test_one_formula_for_all_sizes():
    for own, length in itertools.product(range(1, 34), range(1, 67)):
        table = torch.randn(2 * own - 1, 3, dtype=torch.float64)
        got = fit_table(table, length)
        torch.testing.assert_close(got, interpolated(table, length), rtol=0, atol=1e-12)
        if length <= own:
            assert torch.equal(got, interpolated(table, length))
        # Offsets that keep their embedding keep it bit for bit.
        assert torch.equal(got[length - 1], table[own - 1])
        if length > own:
            assert torch.equal(got[[0, -1]], table[[0, -1]] if length > 1 else table)


def test_exported_and_not_are_the_same_formula(monkeypatch):
    tables = {own: torch.randn(2 * own - 1, 3, dtype=torch.float64) for own in (1, 2, 7, 12)}
    cases = list(itertools.product(tables, (1, 2, 6, 7, 11, 23), (1, 2, 3)))
    before = [fit_table(tables[own], length, pool) for own, length, pool in cases]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for (own, length, pool), expected in zip(cases, before, strict=True):
        assert torch.equal(fit_table(tables[own], length, pool), expected), (own, length, pool)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_table_keeps_its_dtype(dtype):
    assert fit_table(torch.randn(5, 3).to(dtype), 7).dtype == dtype
