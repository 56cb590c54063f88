"""The benchmarks: they time the same computations and report every number."""

import json
from dataclasses import fields

import pytest
import torch

from benchmarks import attention, augment, batches, bench, layer, step, timing
from data import Augmentation
from models import augmented_layers
from training.compose import CONFIGS

from helpers import call


def go(out, name, *arguments):
    """Run a benchmark; return its rows and its page."""
    words = [name, *map(str, arguments), "--out", str(out)]
    call(bench.main, *words)
    record = json.loads((out / f"{name}.json").read_text())
    assert {"hardware", "versions", "commit", "rounds"} <= record.keys()
    assert record["command"] == " ".join(["python", "-m", "benchmarks.bench", *words])
    return record["rows"], (out / f"{name}.md").read_text()


LAYER = {"size": 3, "batch": 2, "dtype": "float32", "channels": 12, "dk": 6, "dv": 4, "Nh": 2}
LAYER["channels_last"] = "no"


def test_pad_and_reshape_is_the_same_layer():
    theirs, ours = (
        layer.build(method, 7, 12, dk=6, dv=4, Nh=2).double()
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
    monkeypatch.setattr(timing, "peak", lambda make, case, _: 7.0 + len(case["method"]))
    reasons = {"fused": "needs a CUDA GPU", "native": "needs a compiler"}
    monkeypatch.setattr(layer, "unavailable_reason", lambda name, *_, **__: reasons.get(name))
    sizes = ("--channels", 12, "--dk", 6, "--dv", 4, "--Nh", 2, "--rounds", 2)
    rows, page = go(tmp_path, "layer", "--size", 3, 5, "--batch", 1, *sizes)
    assert [(r["size"], r["method"]) for r in rows] == [
        (size, method) for size in (3, 5) for method in layer.METHODS
    ]
    assert {r["channels"] for r in rows} == {12}
    timed = [r for r in rows if r["method"] not in reasons]
    assert all(len(r[k]) == 2 for r in timed for k in ("forward_ms", "both_ms"))
    assert "| 5x5 | 1 | float32 | fused | needs a CUDA GPU |" in page
    assert "| 5x5 | 1 | float32 | native | needs a compiler |" in page
    assert page.strip() in capsys.readouterr().out
    assert f"| {(7 + len('tiled')) / (7 + len('pad and reshape')):.2f} |" in page


@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_are_timed_in_the_memory_format_asked_for(channels_last):
    case = LAYER | {"channels_last": "yes" if channels_last else "no", "method": "sdpa"}
    x, network = layer.prepare(case, torch.device("cpu"))
    out, x_grad, *_ = layer.run(network, x, torch.float32, backward=True)()
    for tensor in (x, out, x_grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_method_that_does_not_fit_is_listed_without_times(monkeypatch):
    monkeypatch.setattr(timing, "peak", lambda *_: 1.0)
    monkeypatch.setattr(layer, "fits", lambda case, _: case["method"] != "pad and reshape")
    rows = layer.measure(LAYER, torch.device("cpu"), 1)
    lines = bench.table([layer.cells(row) for row in rows])
    assert any("| pad and reshape | does not fit into memory |" in line for line in lines)
    assert all("time_ratio" not in row for row in rows)
    huge = LAYER | {"size": 512, "batch": 64, "Nh": 8}
    monkeypatch.undo()
    assert not layer.fits(huge | {"method": "reference"}, torch.device("cpu"))
    assert layer.fits(huge | {"method": "tiled"}, torch.device("cpu"))


@pytest.mark.slow
def test_peak_memory_of_a_pass_covers_its_logits():
    case = LAYER | {"size": 16, "batch": 8, "channels": 8, "dk": 8, "dv": 8, "Nh": 8}
    case["method"] = "reference"
    logits = 8 * 8 * 16**4 * 4 / 2**20  # 16 MiB
    assert timing.peak(layer.whole_pass, case, torch.device("cpu")) > 2 * logits


def test_bench_step(monkeypatch, tmp_path):
    monkeypatch.setattr(
        timing, "peak", lambda make, case, _: {"none": 2.0, "aa": 3.0}[case["attention"]]
    )
    words = ("--model", "resnet8", "--batch", 2, "--rounds", 1)
    (plain, augmented), page = go(tmp_path, "step", *words)
    assert plain["time_ratio"] == plain["memory_ratio"] == 1
    assert augmented["time_ratio"] == augmented["step_ms"][0] / plain["step_ms"][0]
    assert augmented["memory_ratio"] == 1.5
    assert plain["flops"] < augmented["flops"]
    for row in (plain, augmented):
        seconds = row["step_ms"][0] / 1e3
        assert row["images_per_s"] == pytest.approx(2 / seconds)
        assert row["flop_per_s"] == pytest.approx(2 * 3 * row["flops"] / seconds)
    assert "| resnet8 | aa |" in page
    assert "| 1.50 |" in page


def test_all_combinations_of_the_options_are_cases(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(step, "measure", lambda case, *_: seen.append(case) or [])
    words = ("--model", "a", "b", "--batch", 2, 3, "--out", tmp_path)
    call(bench.main, "step", *words)
    assert [(case["model"], case["batch"]) for case in seen] == [
        ("a", 2), ("a", 3), ("b", 2), ("b", 3)
    ]  # fmt: skip
    assert all(case["attention"] == ["none", "aa"] for case in seen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["step", "--device", "gpu"], "device=gpu is not a device"),
        (["step", "--precision", "int8"], "invalid choice: 'int8'"),
        (["batches", "--precision", "int8"], "invalid choice: 'int8'"),
        (["layer", "--dtype", "float64"], "invalid choice: 'float64'"),  # not an autocast dtype
        (["attention", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["step", "--model", "resnet9"], "Could not find 'model/resnet9'"),
    ],
)
def test_mistakes_end_with_one_line(capsys, tmp_path, words, message):
    with pytest.raises(SystemExit) as stopped:
        call(bench.main, *words, "--out", tmp_path)
    line = stopped.value.code
    assert message in (line if isinstance(line, str) else capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_bench_step_takes_its_options(monkeypatch):
    case = {"model": "resnet8", "attention": "aa", "backend": "sdpa", "size": 32}
    layers = augmented_layers(step.build(case))
    assert {m.backend for m in layers.values()} == {"sdpa"}
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    case |= {"attention": "none", "backend": "auto", "batch": 2, "precision": "bf16"}
    case |= {"channels_last": "yes", "compile": "yes"}
    take_step = step.training_step(step.build, case, torch.device("cpu"))
    seen = []
    compiled[0].conv.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    before = compiled[0].conv.weight.detach().clone()
    take_step()
    images, out = seen[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(before, compiled[0].conv.weight)


def test_every_round_runs_all_steps_and_the_first_one_is_not_counted():
    order = []
    taken = timing.rounds(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 3
    )
    assert order == ["a", "b"] * 4
    assert {k: len(v) for k, v in taken.items()} == {"a": 3, "b": 3}


def test_a_step_on_an_accelerator_is_timed_until_it_is_through(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    timing.rounds({"a": lambda: None}, torch.device("mps"), 1)
    assert waited == [torch.device("mps")] * 4
    timing.wait(torch.device("cpu"))
    assert len(waited) == 4


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_bench_attention(monkeypatch, tmp_path, capsys):
    # Without a GPU, the fused kernels would run in Triton's interpreter.
    available = attention.unavailable_reason
    monkeypatch.setattr(
        attention,
        "unavailable_reason",
        lambda name, *a, **k: "no GPU" if name == "fused" else available(name, *a, **k),
    )
    cases = ("--size", 3, 5, "--keys", 4, "--values", 2, 3, "--relative", "yes", "no")
    sizes = ("--heads", 2, "--rounds", 2, "--logits", 5000)
    rows, page = go(tmp_path, "attention", "--device", "cpu", *cases, *sizes)
    assert [(r["size"], r["values"], r["relative"]) for r in rows] == [
        (size, values, relative)
        for size in (3, 5)
        for values in (2, 3)
        for relative in ("yes", "no")
    ]
    assert [r["batch"] for r in rows] == [31] * 4 + [4] * 4  # 5000 / 2 / 81 and 5000 / 2 / 625
    for row in rows:
        assert {"reference", "sdpa", "tiled"} <= row["ms"].keys()
        assert "fused" not in row["ms"]
        assert all(len(times) == 2 for times in row["ms"].values())
        assert row["auto"] in row["ms"]
        assert min(row["ms"], key=lambda n: sum(row["ms"][n])) == row["fastest"]
    assert page.strip() in capsys.readouterr().out
    assert page.count("**") == 2 * len(rows)


def test_bench_images(tmp_path):
    words = ("--mib", 1, "--size", 32, "--batch", 100, "--rounds", 2, "--device", "cpu")
    (row,), page = go(tmp_path, "images", *words)
    assert row["images"] == 2**20 // (32 * 32 * 3)
    assert {name: len(ms) for name, ms in row["ms"].items()} == {
        "memory": 2, "mapped": 2, "begin": 2,
    }  # fmt: skip
    ratio = timing.ratio(row["ms"]["mapped"], row["ms"]["memory"])
    assert f"| {ratio:.2f} |" in page


@pytest.mark.slow
def test_bench_augment(monkeypatch, tmp_path):
    peaks = {"plain": 4.0, "pooled": 5.0, "full": 7.0}
    monkeypatch.setattr(timing, "peak", lambda make, case, _: peaks[case["attention"]])
    words = ("--model", "resnet18", "--size", 193, "--batch", 1, "--rounds", 1, "--backend", "sdpa")
    rows, page = go(tmp_path, "augment", *words)
    plain, pooled, full = rows
    assert [row["attention"] for row in rows] == list(peaks)
    assert plain["parameters"] == 11_689_512  # from torchvision's documentation
    assert pooled["parameters"] == full["parameters"] > plain["parameters"]
    assert plain["flops"] < pooled["flops"] < full["flops"]
    assert "| 1.75 |" in page
    layers = augmented_layers(augment.build(full)).values()
    assert {(layer.backend, layer.pool) for layer in layers} == {("sdpa", 1)}


@pytest.mark.thorough
def test_peak_is_that_of_a_step_in_a_new_process():
    assert timing.peak(holds, 64, torch.device("cpu")) > 60


def holds(mebibytes, device):
    """Return a step that fills this much memory."""
    return lambda: torch.ones(mebibytes * 2**18, device=device).sum()


def test_bench_batches(tmp_path):
    words = ("--augmentation", "none", "mixup=1", "trivial", "--model", "resnet8", "--batch", 4)
    rows, page = go(tmp_path, "batches", *words, "--images", 20, "--rounds", 2)
    assert [row["augmentation"] for row in rows] == ["none", "mixup=1", "trivial"]
    for row in rows:
        assert len(row["batch_ms"]) == len(row["step_ms"]) == len(row["draw_ms"]) == 2
        assert f"| {row['augmentation']} | resnet8 | 4 |" in page
    labels = [next(batches.make_batches(rows[0], name, torch.device("cpu")).epoch(0))[1]
              for name in ("standard", "mixup=1")]  # fmt: skip
    assert [tuple(label.shape) for label in labels] == [(4,), (4, 100)]


def test_every_setting_of_the_augmentation_is_timed_and_drawn():
    """The exceptions are RandAugment's settings and the padding, which options set."""
    shown = {word.partition("=")[0] for word in batches.ALL}
    options = {path.stem for path in (CONFIGS / "augmentation").glob("*.yaml")}
    named = {field.name for field in fields(Augmentation)}
    assert shown >= options
    assert shown | options >= named - {"crop_pad", "policy", "rand_ops", "rand_magnitude"}
