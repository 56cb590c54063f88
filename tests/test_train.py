"""Tiny complete runs: what a run writes, repeats and resumes, and what each setting changes."""

import json
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

import models
import train
from data import Dataset, Images
from training import cli, provenance, summary
from training.assemble import build_model
from training.compose import compose_config
from training.device import precision_name
from training.settings import check

from helpers import CONFIGS, TINY, everything_below, rows, slow, thorough


def test_what_a_run_writes(run, tmp_path):
    summary = run()
    folder = tmp_path / "run"
    written = {"last.pt", "previous.pt", "metrics.csv", "summary.json", "train.log", ".hydra"}
    written |= {"weights.safetensors", "config.json"}
    assert {p.name for p in folder.iterdir()} == written
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    table = rows(folder)
    assert [row["epoch"] for row in table] == ["1", "2"]
    scores = ["test/loss", "test/top1", "test/top5"]
    training = ["train/loss", "train/top1", "train/grad_norm", "train/lr"]
    attention = ["attention/entropy", "attention/lowest_entropy"]
    assert list(table[0]) == ["epoch", *training, *scores, *attention]
    assert all(0 < float(row[name]) <= 1 for row in table for name in attention)
    assert [layer["dk"] for layer in summary["layers"]] == [32, 32]
    assert summary["test/top1"] == float(table[-1]["test/top1"])
    assert summary["epochs"] == 2
    assert summary["attention"] == "aa"
    assert summary["model"] == "resnet8"
    assert summary["evaluated_on"] == "test"
    assert summary["config"]["attention"]["dk"] == 0.5
    assert summary["parameters"] > 0
    assert summary["flops"] > 0
    assert len(summary["per_class_top1"]) == len(summary["class_names"]) == 8
    (segment,) = summary["segments"]
    assert segment["versions"]["torch"] == torch.__version__
    assert len(segment["commit"].removesuffix("-dirty")) in (40, len("unknown"))
    assert (segment["first_epoch"], segment["precision"], segment["processes"]) == (1, "float32", 1)


def load_noise(number):
    """A data set defined in code, with another image size and its own held-out images."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (number, 40, 44, 3), generator=draw, dtype=torch.uint8)
    images = Images(pixels, torch.arange(number) % 2)
    held_out = torch.arange(number) < 16
    return Dataset(
        name="noise",
        train=images.select(~held_out),
        evaluation=images.select(held_out),
        evaluated_on="val",
        num_classes=2,
        class_names=("even", "odd"),
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
    )


@dataclass
class NoiseConfig:
    _target_: str = "test_train.load_noise"
    number: int = 48


def test_a_data_set_in_code_need_not_be_like_cifar(settings, tmp_path):
    cfg = settings("batch_size=32", "augmentation.cutout=36")  # larger than a CIFAR image
    with open_dict(cfg):
        cfg.data = OmegaConf.structured(NoiseConfig)
    check(cfg)
    assert train.train(cfg, tmp_path)["data"] == "noise"
    cfg.batch_size = 33
    with pytest.raises(ValueError, match="batch_size=33 does not fit 32 training images"):
        train.train(cfg, tmp_path / "other")


@pytest.mark.parametrize("ema", [slow("null"), "0.5"])
def test_the_best_epochs_network_is_kept_beside_the_last_ones(run, tmp_path, monkeypatch, ema):
    """Ties go to the first epoch, even if each epoch is trained by a separate process.

    The scores of a run are still those of the last epoch.
    """
    words = ["epochs=4", "data.val_size=16", f"ema={ema}"]
    scores = iter([40.0, 50.0, 50.0, 10.0] * 2)
    after = []

    def evaluate(model, *_):
        after.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"loss": 1.0, "top1": next(scores), "top5": 99.0}, [None] * 8

    monkeypatch.setattr(train, "evaluate", evaluate)
    plain = run(*words, folder="plain")
    monkeypatch.setattr(train.Stop, "after_epoch", lambda self, last: train.Action.STOP)
    for _ in range(3):
        with pytest.raises(SystemExit):
            run(*words, "keep_best=true", "resume=auto", folder="parts")
    summary = run(*words, "keep_best=true", "resume=auto", folder="parts")
    assert summary["val/top1"] == plain["val/top1"] == 10.0
    assert (summary["best/epoch"], summary["best/val_top1"]) == (2, 50.0)
    assert rows(tmp_path / "plain") == rows(tmp_path / "parts")
    assert not (tmp_path / "plain" / "best.safetensors").exists()
    assert "best/epoch" not in plain
    for name, epoch in (("weights", 4), ("best", 2)):
        network = models.load(tmp_path / "parts" / f"{name}.safetensors").network
        expected = {k.removeprefix("module."): v for k, v in after[epoch - 1].items()}
        for key, value in network.state_dict().items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.slow
def test_resume_from_a_path_does_not_replace_the_run_that_is_there_unless_told_to(run, tmp_path):
    first = run(folder="a")
    run("seed=5", folder="b")
    before = (tmp_path / "b" / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="b already holds a run"):
        run(f"resume={tmp_path / 'a'}", folder="b")
    assert (tmp_path / "b" / "metrics.csv").read_bytes() == before
    again = run(f"resume={tmp_path / 'a'}", "overwrite=true", folder="b")
    assert again["test/top1"] == first["test/top1"]
    assert again["per_class_top1"] == first["per_class_top1"]
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    everything = {path.name for path in (tmp_path / "a").iterdir()} - {"previous.pt"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == everything


def test_what_resume_has_begun_elsewhere_can_be_continued(run, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run("max_minutes=1e-9", folder="a")
    start = train.start_tracking
    monkeypatch.setattr(train, "start_tracking", None)
    with pytest.raises(TypeError, match="not callable"):
        run(f"resume={tmp_path / 'a'}", folder="b")
    monkeypatch.setattr(train, "start_tracking", start)
    assert run("resume=auto", folder="b")["epochs"] == 2


def test_a_finished_run_is_never_written_again(run, tmp_path, monkeypatch, caplog):
    """Not even if resumed on another commit, in another precision, or without its checkpoints."""
    summary = run(folder="a")
    monkeypatch.setattr(provenance, "commit", lambda: "another")
    monkeypatch.setattr(train, "choose_dtype", lambda *_: torch.bfloat16)
    last, previous = tmp_path / "a" / "last.pt", tmp_path / "a" / "previous.pt"
    for change in (None, previous.unlink, lambda: last.write_bytes(b"x"), last.unlink):
        if change is not None:
            change()
        before = everything_below(tmp_path / "a")
        caplog.clear()
        with caplog.at_level("INFO"):
            assert run("resume=auto", folder="a") == summary
        assert "already finished" in caplog.text
        assert everything_below(tmp_path / "a") == before
    with pytest.raises(ValueError, match="a already holds a run; resume=auto continues it"):
        run(folder="a")
    (tmp_path / "a" / "summary.json").unlink()
    before = everything_below(tmp_path / "a")
    with pytest.raises(ValueError, match="a holds a run without a checkpoint to continue from"):
        run("resume=auto", folder="a")
    assert everything_below(tmp_path / "a") == before


def test_a_finished_run_whose_summary_is_damaged_says_how_to_write_it_again(run, steps, tmp_path):
    summary = run()
    taken = len(steps)
    (tmp_path / "run" / "summary.json").write_text("damaged")
    with pytest.raises(ValueError, match="without that file resume=auto writes it again"):
        run("resume=auto")
    (tmp_path / "run" / "summary.json").unlink()
    assert run("resume=auto") | {"config": summary["config"]} == summary
    assert len(steps) == taken


def test_a_run_keeps_the_name_of_its_precision(run, tmp_path):
    """Resuming with ``precision=fp32`` instead of ``auto`` does not make a new variant."""
    with pytest.raises(SystemExit):
        run("precision=auto", "max_minutes=1e-9")
    precision = torch.load(tmp_path / "run" / "last.pt")["segments"][0]["precision"]
    summary = run(f"precision={precision_name(precision)}", "resume=auto")
    assert summary["config"]["precision"] == "auto"
    assert summary == run("precision=auto", "resume=auto") == run("precision=fp32", "resume=auto")


@pytest.mark.parametrize("most", [255, 256])
def test_attention_over_larger_maps_than_the_papers_is_said(run, monkeypatch, caplog, most):
    assert summary.MAX_POSITIONS == 32 * 32
    monkeypatch.setattr(summary, "MAX_POSITIONS", most)
    run("epochs=1")
    line = "attention on maps of 16x16 costs most of these FLOPs; attention.stages=[...]"
    assert (line in caplog.text) == (most < 16 * 16)


def test_a_schedule_that_is_elsewhere_than_its_run_is_refused(run, tmp_path):
    """With the learning rate of another step, the results would differ or torch would fail."""
    with pytest.raises(SystemExit):
        run("max_minutes=1e-9")
    path = tmp_path / "run" / "last.pt"
    whole = torch.load(path, weights_only=True)
    taken = whole["schedule"]["last_epoch"]
    for step in (-7, taken + 1, 10**9, "x"):
        torch.save(whole | {"schedule": {**whole["schedule"], "last_epoch": step}}, path)
        with pytest.raises(ValueError, match=f"schedule.last_epoch is {step} steps, not {taken}"):
            run("resume=auto")


def test_a_run_is_not_overwritten_by_accident(run, tmp_path):
    run(folder="a")
    before = (tmp_path / "a" / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; resume=auto continues it"):
        run("seed=9", folder="a")
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == before
    with pytest.raises(ValueError, match="attention in stage 2"):
        run("attention.dk=7", "overwrite=true", folder="a")
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == before
    assert run("seed=9", "overwrite=true", folder="a")["seed"] == 9


@pytest.mark.slow
def test_learns_a_batch_by_heart(run):
    overrides = [
        "data.train_size=64",
        "batch_size=16",
        "data.noise=0",
        "epochs=40",
        "optim.lr=0.01",
    ]
    summary = run(*overrides, "model.widths=[16,32,64]", "model.stem=16")
    assert summary["train/loss"] < 0.05


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory):
    """A function that returns the rows of a tiny run with these settings, trained only once."""

    @cache
    def train_once(*words):
        folder = tmp_path_factory.mktemp("run")
        train.train(compose_config([*TINY, "epochs=1", *words, f"out_dir={folder}"]), folder)
        return rows(folder)

    return train_once


# The last word of each must change the results of the run's epoch of three steps.
@pytest.mark.parametrize(
    "words",
    [
        slow("attention=none"),
        slow("attention=ge"),
        slow("attention.dk=16"),
        slow("attention.dv=8"),
        slow("attention.Nh=2"),
        slow("attention.min_dkh=3"),
        slow("attention.position=none"),
        slow("attention.stages=[2]"),
        slow("model.shortcut=pad"),
        slow("model.block=preact"),
        slow("model.depths=[2,1,1]"),
        slow("model.stem=3"),
        slow("data.noise=0.2"),
        slow("data.data_seed=1"),
        slow("data.val_size=32"),
        slow("augmentation.crop_pad=1"),
        slow("augmentation.flip=true"),
        slow("augmentation.flip=alternating"),
        slow("augmentation.cutout=4"),
        slow("augmentation.policy=trivial"),
        slow("augmentation.policy=auto"),
        slow("augmentation.erasing=0.5"),
        slow("augmentation.mixup=1.0"),
        slow("augmentation.cutmix=1.0"),
        slow("optim=sgd"),
        "optim.lr=0.001",
        slow("optim.weight_decay=0.5"),
        slow("optim.betas=[0.8,0.99]"),
        slow("schedule=warmup_cosine"),
        slow("schedule.warmup=0.5"),
        slow("schedule.start=0.5"),
        slow("schedule.end=0.01"),
        slow("batch_size=16"),
        slow("grad_accum=2"),
        slow("label_smoothing=0.1"),
        slow("grad_clip=0.1"),
        slow("ema=0.5"),
        slow("precision=bf16"),
        slow("precision=fp16"),
        slow("class_weights=balanced"),
        slow("balanced_sampling=true"),
        slow("optim=sgd optim.momentum=0.5"),
        slow("optim=sgd optim.nesterov=false"),
        slow("attention=se attention.ratio=4 attention.ratio=2"),
        slow("augmentation=standard augmentation.padding=reflect"),
        slow("augmentation=rand augmentation.rand_ops=1"),
        slow("augmentation=rand augmentation.rand_magnitude=20"),
    ],
)
def test_every_setting_changes_the_run(rows_of, words):
    *choice, _ = words = words.split()
    assert rows_of(*choice) != rows_of(*words)


def test_fp16_that_overflows_in_the_first_step_says_nothing(run, tmp_path, monkeypatch):
    """The scaler skips that step; a warning of torch about the schedule would fail the test."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(train.torch.amp, "GradScaler", scaler)
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: taken.append(1) or step(self, *args)
    )
    run("precision=fp16", "epochs=1", "data.train_size=64")
    assert len(rows(tmp_path / "run")) == 1
    assert not taken


# Each must give the same results, up to rounding.
@pytest.mark.parametrize(
    "override",
    [slow("attention.backend=reference"), slow("channels_last=false"), slow("eval_batch_size=7")],
)
def test_ways_to_compute_agree(rows_of, override):
    for a, b in zip(rows_of(), rows_of(override), strict=True):
        for key in a:
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-3), key


@pytest.mark.slow
def test_compile_is_called_and_agrees(run, rows_of, tmp_path, monkeypatch):
    compiled = []

    def by_eager(model):
        compiled.append(model)
        return torch._dynamo.optimize("aot_eager")(model)

    (expected,) = rows_of()
    monkeypatch.setattr(torch, "compile", by_eager)
    run("epochs=1", "compile=true")
    assert len(compiled) == 1
    (row,) = rows(tmp_path / "run")
    assert float(row["train/loss"]) == pytest.approx(float(expected["train/loss"]), rel=1e-3)


@pytest.fixture
def graphs(monkeypatch):
    """A list of compiled graphs, which run eagerly; torch may keep two programs for one code."""
    compile, graphs = torch.compile, []

    def remember(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=remember))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        yield graphs


@pytest.mark.thorough
def test_every_job_of_a_sweep_is_compiled(run, graphs):
    for job, dk in enumerate((32, 40, 48), start=1):
        run("compile=true", f"attention.dk={dk}", "epochs=1", folder=str(dk))
        assert len(graphs) == 2 * job  # one for training, one for evaluation


@pytest.mark.slow
def test_a_network_that_would_go_on_uncompiled_is_told_of_in_one_line(run, graphs, capsys):
    # The evaluation has batches of two sizes, so three programs are compiled.
    with pytest.raises(SystemExit) as stopped, cli.one_line_errors():
        run("compile=true", "epochs=1", "eval_batch_size=30")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "train.py: compile=true, but torch gave up after compiling this network 2 times "
        "(TORCH_LOGS=recompiles says why); use compile=false"
    )
    assert len(graphs) == 2


@pytest.mark.slow
def test_channels_last_reaches_the_weights(run, tmp_path, monkeypatch):
    seen = []

    def remember(*arguments, **sizes):
        seen.append(build_model(*arguments, **sizes))
        return seen[-1]

    monkeypatch.setattr("training.assemble.build_model", remember)
    run("epochs=1", folder="a")
    run("epochs=1", "channels_last=false", folder="b")
    last, first = (m.stages[0][0].conv1.weight for m in seen)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert not first.is_contiguous(memory_format=torch.channels_last)


def options(group):
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


def marked(model, attention):
    """Leave one network with every attention to `make test`, and every network with one."""
    if model == "resnet8":
        return pytest.param
    return slow if attention == "aa" else thorough


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        marked(model, attention)(model, attention)
        for model, attention in product(options("model"), options("attention"))
        # These keep a part of the convolution, which this network has none of.
        if model != "alternet18" or attention not in ("mean", "pointwise", "removed")
    ],
)
def test_every_model_takes_every_attention(settings, model, attention):
    cfg = settings(f"model={model}", f"attention={attention}", base=[])
    assert cfg.model.name == model
    with torch.device("meta"):
        network = build_model(cfg, num_classes=100, image_size=(32, 32))
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)


@pytest.mark.parametrize(
    "experiment", [name if name == "lookup" else slow(name) for name in options("experiment")]
)
def test_every_experiment_trains(run, experiment):
    small = [
        "data=lookup",
        "data.train_size=32",
        "data.test_size=16",
        "data.val_size=0",
        "batch_size=16",
        "epochs=1",
        "model.depths=[1,1,1]",
        "model.widths=[8,8,8]",
        "model.stem=4",
        "model.aa.stages=[2,3]",
        "tracking=csv",
        "compile=false",
    ]
    summary = run(f"experiment={experiment}", *small, base=[])
    assert summary["config"]["name"] == experiment
    assert 0 <= summary["test/top1"] <= 100


@pytest.mark.parametrize("attention", ["none", "ge", "se", "aa"])
def test_the_papers_recipe_and_the_equal_one(settings, attention):
    cfg = settings("experiment=table1", f"attention={attention}", base=[])
    batch = 256 if attention == "aa" else 1024
    assert cfg.batch_size == batch
    assert cfg.optim.lr == pytest.approx(0.2 * batch / 256)
    assert cfg.optim.weight_decay == (5e-4 if attention == "aa" else 2e-4)
    equal = settings("experiment=table1_equal", f"attention={attention}", base=[])
    assert (equal.batch_size, equal.optim.lr, equal.optim.weight_decay) == (256, 0.2, 5e-4)
    for paper in (cfg, equal):
        assert (paper.epochs, paper.schedule.warmup, paper.model.shortcut) == (500, 0.05, "pad")
        assert (paper.optim.momentum, paper.optim.nesterov) == (0.9, False)


def test_sweeps_of_the_experiments():
    def sweep(experiment):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
        return dict(cfg.hydra.sweeper.params)

    assert sweep("ablation_position") == {"attention.position": "relative,none,sine,coord"}
    assert sweep("ablation_ratio") == {"attention.dk": "0.25,0.5,0.75,1.0"}
    assert sweep("sweep_heads").keys() == {"attention.dk", "attention.dv", "attention.Nh"}


@pytest.mark.parametrize("group", ["data", "optim", "schedule", "tracking", slow("experiment")])
def test_every_option_composes(settings, group):
    for option in options(group):
        place = ["data.root=mine"] if option == "folder" else []  # has no default
        OmegaConf.to_container(
            settings(f"{group}={option}", *place, base=[]), resolve=True, throw_on_missing=True
        )
