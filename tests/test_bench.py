"""The benchmark scripts: what they time is the same computation, and every figure is there."""

import json
import math
import sys

import pytest
import torch

from reporting import timing
from scripts import bench_attention, bench_augment, bench_layer, bench_step, bench_tracking


def go(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
    script.main()


def test_pad_and_reshape_is_the_same_layer():
    theirs, ours = (
        bench_layer.build(method, 7, 12, dk=6, dv=4, Nh=2).double()
        for method in ("pad and reshape", "tiled")
    )
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    x = torch.randn(2, 12, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-10)
    gradients = [
        torch.autograd.grad(m(x).square().sum(), tuple(m.parameters())) for m in (theirs, ours)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_bench_layer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_layer, "peak", lambda method, *_: 7.0 + len(method))
    reasons = {"fused": "needs a CUDA GPU", "native": "needs a compiler"}
    monkeypatch.setattr(bench_layer, "unavailable_reason", lambda name, *_, **__: reasons.get(name))
    sizes = ("--channels", 12, "--dk", 6, "--dv", 4, "--Nh", 2, "--rounds", 2)
    go(bench_layer, monkeypatch, "--sizes", 3, 5, "--batches", 1, *sizes, "--out", tmp_path)
    record = json.loads((tmp_path / "bench_layer.json").read_text())
    assert {"hardware", "versions", "commit", "command", "layer"} <= record.keys()
    assert [(r["size"], r["method"]) for r in record["rows"]] == [
        (size, method) for size in (3, 5) for method in bench_layer.METHODS
    ]
    timed = [r for r in record["rows"] if r["method"] not in reasons]
    assert all(len(r[k]) == 2 for r in timed for k in ("forward_ms", "both_ms"))
    written = (tmp_path / "bench_layer.md").read_text()
    assert "| 5x5 | 1 | float32 | fused | needs a CUDA GPU |" in written
    assert "| 5x5 | 1 | float32 | native | needs a compiler |" in written
    assert written.strip() in capsys.readouterr().out
    assert f"| {(7 + len('tiled')) / (7 + len('pad and reshape')):.2f} |" in written


@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_are_timed_in_the_memory_format_asked_for(channels_last):
    case = {"size": 3, "batch": 2, "dtype": "float32", "channels": 12, "dk": 6, "dv": 4, "Nh": 2}
    case["channels_last"] = channels_last
    x, layer = bench_layer._prepare("sdpa", case, torch.device("cpu"))
    assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
    out = bench_layer.step(layer, x, torch.float32, backward=True)()
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert x.grad.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_method_that_does_not_fit_is_listed_without_times(monkeypatch):
    monkeypatch.setattr(bench_layer, "peak", lambda *_: 1.0)
    monkeypatch.setattr(bench_layer, "_fits", lambda method, *_: method != "pad and reshape")
    case = {"size": 3, "batch": 1, "dtype": "float32", "channels": 12, "dk": 6, "dv": 4, "Nh": 2}
    case["channels_last"] = False
    rows = bench_layer.measure(case, torch.device("cpu"), 1)
    assert "| pad and reshape | does not fit into memory |" in bench_layer.table(rows)
    huge = case | {"size": 512, "batch": 64, "Nh": 8}
    monkeypatch.undo()
    assert not bench_layer._fits("reference", huge, torch.device("cpu"))
    assert bench_layer._fits("tiled", huge, torch.device("cpu"))


@pytest.mark.slow
def test_peak_memory_of_a_pass_covers_its_logits():
    case = {"size": 16, "batch": 8, "dtype": "float32", "channels": 8, "dk": 8, "dv": 8, "Nh": 8}
    case["channels_last"] = False
    logits = 8 * 8 * 16**4 * 4 / 2**20  # 16 MiB
    assert bench_layer.peak("reference", case, "cpu") > 2 * logits


def test_bench_step(monkeypatch, tmp_path):
    monkeypatch.setattr(
        timing, "peak", lambda make, case, _: {"none": 2.0, "aa": 3.0}[case["attention"]]
    )
    monkeypatch.setattr(bench_step, "rates", lambda *_: {"matmul_flops": 1e9, "exp_per_s": 1e6})
    arguments = ("--models", "resnet8", "--batch", 2, "--rounds", 1, "--out", tmp_path)
    go(bench_step, monkeypatch, *arguments)
    plain, augmented = json.loads((tmp_path / "bench_step.json").read_text())["rows"]
    assert plain["floor_ms"]["exponentials"] == 0
    # ResNet-8's block of 16x16 and its block of 8x8 attend with 4 heads, forward and backward.
    powers = 2 * 2 * 4 * (16**4 + 8**4)
    assert augmented["floor_ms"]["exponentials"] == pytest.approx(powers / 1e6 * 1e3)
    seconds = augmented["step_ms"][0] / 1e3
    assert augmented["of_matmul_rate"] == pytest.approx(augmented["flops"] / seconds / 1e9)
    floor = sum(augmented["floor_ms"].values()) / 1e3
    assert augmented["of_floor"] == pytest.approx(seconds / floor)
    assert "| 1.50 |" in (tmp_path / "bench_step.md").read_text()


def test_bench_step_takes_its_options(monkeypatch):
    layers = bench_step.augmented_layers(bench_step.build("resnet8", "aa", "sdpa"))
    assert {m.backend for m in layers.values()} == {"sdpa"}
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    case = {
        "model": "resnet8",
        "attention": "none",
        "backend": "auto",
        "batch": 2,
        "precision": "bf16",
        "channels_last": True,
        "compile": True,
    }
    step = bench_step.training_step(case, torch.device("cpu"))
    seen = []
    compiled[0].conv.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    before = compiled[0].conv.weight.detach().clone()
    step()
    images, out = seen[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(before, compiled[0].conv.weight)


def test_rates_and_rounds():
    rates = bench_step.rates(torch.device("cpu"), torch.float32)
    assert all(1e6 < rate < math.inf for rate in rates.values())
    order = []
    taken = timing.rounds(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 3
    )
    assert order == ["a", "b"] * 4
    assert {k: len(v) for k, v in taken.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
def test_bench_tracking_times_every_part():
    tiny = ["model=resnet8", "model.widths=[4,8,8]", "model.stem=4", "batch_size=32", "device=cpu"]
    seconds = bench_tracking.measure(tiny, 2)
    assert seconds.keys() == {"step", "norm", "right", "pictures", "tables", "row"}
    assert all(len(values) == 2 for values in seconds.values())


def test_bench_tracking_says_what_a_part_is_of_the_whole():
    names = ("norm", "right", "pictures", "tables", "row")
    seconds = {"step": [0.2, 0.1, 0.3]} | {key: [0.002] for key in names}
    told = bench_tracking.lines(seconds, 100)  # 500 steps of 0.2 s: an epoch of 100 s
    assert told[0] == "step        200.000 ms (100.000 to 300.000)"
    assert told[1].endswith(": 1.0000 % of a step")
    assert told[3].endswith(": 0.0002 % of 30 epochs, three times")
    assert told[4].endswith(": 0.0007 % of 30 epochs, once")
    assert told[5].endswith(": 0.0020 % of an epoch")


def test_bench_attention(monkeypatch, tmp_path, capsys):
    # Without a GPU its kernels would run in Triton's interpreter.
    available = bench_attention.unavailable_reason
    monkeypatch.setattr(
        bench_attention,
        "unavailable_reason",
        lambda name, *a, **k: "no GPU" if name == "fused" else available(name, *a, **k),
    )
    cases = ("--sizes", 3, 5, "--keys", 4, "--values", 2, 3, "--relative", "yes", "no")
    sizes = ("--heads", 2, "--rounds", 2, "--logits", 5000, "--out", tmp_path)
    go(bench_attention, monkeypatch, "--device", "cpu", *cases, *sizes)
    record = json.loads((tmp_path / "bench_attention.json").read_text())
    assert {"hardware", "versions", "commit", "command"} <= record.keys()
    rows = record["rows"]
    assert [(r["size"], r["values"], r["relative"]) for r in rows] == [
        (size, values, relative)
        for size in (3, 5)
        for values in (2, 3)
        for relative in (True, False)
    ]
    assert [r["batch"] for r in rows] == [31] * 4 + [4] * 4  # 5000 / 2 / 81, / 625
    for row in rows:
        assert {"reference", "sdpa", "tiled"} <= row["ms"].keys()
        assert "fused" not in row["ms"]
        assert all(len(times) == 2 for times in row["ms"].values())
        assert row["auto"] in row["ms"]
        assert min(row["ms"], key=lambda n: sum(row["ms"][n])) == row["fastest"]
    written = (tmp_path / "bench_attention.md").read_text()
    assert written.strip() in capsys.readouterr().out
    assert written.count("**") == 2 * len(rows)


@pytest.mark.slow
def test_bench_augment(monkeypatch, tmp_path):
    peaks = {"plain": 4.0, "pooled": 5.0, "full": 7.0}
    monkeypatch.setattr(timing, "peak", lambda make, case, _: peaks[case["variant"]])
    arguments = ("--models", "resnet18", "--size", 193, "--batch", 1, "--rounds", 1)
    go(bench_augment, monkeypatch, *arguments, "--backend", "sdpa", "--out", tmp_path)
    rows = json.loads((tmp_path / "bench_augment.json").read_text())["rows"]
    plain, pooled, full = rows
    assert [row["variant"] for row in rows] == list(peaks)
    assert plain["parameters"] == 11_689_512  # as torchvision's documentation says
    assert pooled["parameters"] == full["parameters"] > plain["parameters"]
    assert plain["flops"] < pooled["flops"] < full["flops"]
    assert "| 1.75 |" in (tmp_path / "bench_augment.md").read_text()
    layers = [m for m in bench_augment.build(full).modules() if hasattr(m, "key_rel_h")]
    assert {(layer.backend, layer.pool) for layer in layers} == {("sdpa", 1)}


def test_peak_is_that_of_a_step_in_a_new_process():
    assert timing.peak(holds, 64, "cpu") > 60


def holds(mebibytes, device):
    """A step that fills so much memory."""
    return lambda: torch.ones(mebibytes * 2**18, device=device).sum()
