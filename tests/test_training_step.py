"""Training steps against loops written out here, independently of train.py."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

import train
from models.fields import parse
from training import run_folder
from training.device import choose_dtype
from training.progress import EpochState, Progress

from helpers import TINY, rows, slow

CPU = torch.device("cpu")
# A step moves the weights by just the learning rate times the gradient.
PLAIN_SGD = ["optim=sgd", "optim.momentum=0", "optim.nesterov=false", "optim.weight_decay=0"]


@pytest.fixture
def built(settings):
    """A function that returns settings with overrides, and their `train.build_state`."""

    def make(*overrides):
        cfg = settings(*overrides)
        dataset = instantiate(cfg.data, _convert_="all").to(CPU)
        dtype = choose_dtype(train.resolve(cfg)["precision"], CPU)
        return cfg, train.build_state(cfg, dataset, train.distributed.world(), CPU, dtype)

    return make


def first_batch(state):
    return next(iter(state.batches.epoch(0)))


def cross_entropy(logits, labels, smoothing):
    """The loss of each image; a share ``smoothing`` of the target is spread over all classes.

    Labels are class indices or weights of the classes.
    """
    log_p = logits.double().log_softmax(dim=1)
    if labels.ndim == 2:
        right = (labels.double() * log_p).sum(dim=1)
    else:
        right = log_p[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * right + smoothing * log_p.mean(dim=1))


def gradients(cfg, model, images, labels):
    """Return the loss of the whole batch and its gradients, with batch norm per micro-batch."""
    micro_batches = list(
        zip(images.chunk(cfg.grad_accum), labels.chunk(cfg.grad_accum), strict=True)
    )
    losses = torch.cat([cross_entropy(model(x), y, cfg.label_smoothing) for x, y in micro_batches])
    of_classes = torch.tensor([float(weight) for weight in cfg.class_weights or [1] * 8])
    weights = (labels if labels.ndim == 2 else torch.eye(8)[labels]) @ of_classes
    loss = (weights * losses).sum() / weights.sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    if cfg.grad_clip is not None:
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        grads = [g * min(1.0, cfg.grad_clip / norm) for g in grads]
    return loss.item(), grads


class Outcome(NamedTuple):
    model: nn.Module
    average: dict[str, Tensor]
    rows: list[dict[str, float]]


def warmup_cosine(cfg, step, total):
    rising = round(cfg.schedule.warmup * total)
    if step < rising:
        return cfg.optim.lr * (step + 1) / rising
    return cfg.optim.lr * (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2


def floating(model):
    """Return weights and running statistics, without the integer batch counters."""
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def by_hand(cfg, state):
    """Train with `PLAIN_SGD` and a warm-up, step by step."""
    model, step, table = copy.deepcopy(state.model), 0, []
    total = cfg.epochs * len(state.batches)
    average = None
    for epoch in range(cfg.epochs):
        model.train()
        losses = []
        for images, labels in state.batches.epoch(epoch):
            loss, grads = gradients(cfg, model, images, labels)
            lr = warmup_cosine(cfg, step, total)
            with torch.no_grad():
                for weight, grad in zip(model.parameters(), grads, strict=True):
                    weight -= lr * grad
            now = {k: v.double() for k, v in floating(model).items()}
            average = average or now
            average = {
                k: v + (1 - (cfg.ema or 0)) * (now[k] - v) if step else v
                for k, v in average.items()
            }
            losses.append(loss)
            step += 1
        judged = copy.deepcopy(model)
        judged.load_state_dict(average, strict=False)
        table.append({"train/loss": sum(losses) / len(losses), "train/lr": lr})
        table[-1] |= scores(judged.eval(), state.dataset)
    return Outcome(model, average, table)


@torch.no_grad()
def scores(model, dataset):
    images = dataset.evaluation
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    logits = model(((images.pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    ahead = (logits > logits.gather(1, images.labels[:, None])).sum(1)
    return {
        "test/loss": cross_entropy(logits, images.labels, 0).mean().item(),
        "test/top1": 100 * (ahead < 1).double().mean().item(),
        "test/top5": 100 * (ahead < 5).double().mean().item(),
    }


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize(
    "overrides",
    [
        slow(["attention=none"]),
        slow(["grad_accum=4", "label_smoothing=0.2"]),
        [
            *("attention=none", "grad_clip=0.5", "ema=0.75", "grad_accum=2"),
            *("label_smoothing=0.2", "class_weights=[1,9,3,4,0.5,6,2,8]"),
        ],
        [
            *("attention=none", "augmentation.mixup=1.0", "grad_accum=2"),
            *("label_smoothing=0.2", "class_weights=[1,9,3,4,0.5,6,2,8]"),
        ],
    ],
    ids=lambda words: ",".join(words),
)
def test_a_run_is_what_a_loop_written_out_gives(run, built, tmp_path, overrides):
    words = [*PLAIN_SGD, "optim.lr=0.03", "schedule=warmup_cosine", "schedule.warmup=0.34"]
    words += ["epochs=3", *overrides]
    expected = by_hand(*built(*words))
    run(*words)
    got = rows(tmp_path / "run")
    assert len(got) == len(expected.rows) == 3
    for row, its in zip(got, expected.rows, strict=True):
        for name, value in its.items():
            assert float(row[name]) == pytest.approx(value, rel=3e-4, abs=1e-9), name
    state = saved(tmp_path / "run")
    for name, value in floating(expected.model).items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-3, atol=1e-5, msg=name)
    if "ema=0.75" in overrides:
        for name, value in expected.average.items():
            average = state["ema_model"][f"module.{name}"].double()
            torch.testing.assert_close(average, value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_seed_draws_a_network_of_its_own(built):
    first, again, other = (built(f"seed={seed}")[1].model.conv.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# The clipping norm as a multiple of the gradients' own norm; above 1 there is no clipping.
@pytest.mark.parametrize("part", [0.25, 4.0])
@pytest.mark.parametrize("scale", [slow(2.0**3), 2.0**16])
def test_a_clipped_step_in_fp16_is_that_of_fp32(built, scale, part):
    """Clipping applies to the unscaled gradients, whatever the loss scale."""
    words = [*PLAIN_SGD, "attention=none", "optim.lr=0.1", "schedule=warmup_cosine"]
    cfg, state = built(*words, "schedule.warmup=0")
    images, labels = first_batch(state)
    state.model.train()
    _, unclipped = gradients(cfg, copy.deepcopy(state.model), images, labels)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in unclipped))

    cfg, state = built(*words, "schedule.warmup=0", "precision=fp16", f"grad_clip={part * norm}")
    state = state._replace(scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    before = copy.deepcopy(dict(state.model.named_parameters()))
    state.model.train()
    _, grads = gradients(cfg, copy.deepcopy(state.model), images, labels)
    train.take_step(cfg, state, images, labels)
    assert state.scaler.get_scale() == scale  # the step was taken
    moved, expected = [], []
    for (name, weight), grad in zip(state.model.named_parameters(), grads, strict=True):
        moved.append((weight - before[name]).detach().double().flatten())
        expected.append(-0.1 * grad.double().flatten())
    moved, expected = torch.cat(moved), torch.cat(expected)
    assert moved.norm().item() == pytest.approx(0.1 * norm * min(1, part), rel=0.02)
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_gradients_in_fp16_that_overflow_cost_the_step_and_lower_the_scale(built):
    cfg, state = built("precision=fp16", "grad_clip=1.0")
    train.take_step(cfg, state, *first_batch(state))
    state.scaler.update(2.0**40)
    before = copy.deepcopy(list(state.model.parameters()))
    train.take_step(cfg, state, *first_batch(state))
    assert state.scaler.get_scale() == 2.0**39
    for weight, was in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(weight, was)


def test_only_fp16_scales_the_loss(built):
    scaled = {p: built(f"precision={p}")[1].scaler.is_enabled() for p in ("fp32", "bf16", "fp16")}
    assert scaled == {"fp32": False, "bf16": False, "fp16": True}


@pytest.mark.parametrize(
    "words",
    [
        (),
        slow(("grad_accum=4",)),
        slow(("grad_clip=0.01",)),
        ("precision=fp16", "grad_clip=0.01"),
        ("augmentation.mixup=1.0", "augmentation.cutmix=1.0", "grad_accum=2"),
    ],
)
def test_an_epochs_row_has_the_mean_accuracy_and_gradient_norm_of_its_steps(built, words):
    """The norm is the one before clipping and without fp16's loss scale."""
    cfg, state = built(*PLAIN_SGD, "attention=none", "optim.lr=0.1", *words)
    unclipped = OmegaConf.merge(cfg, {"grad_clip": None})
    epoch_state, norms, right = EpochState.begin(len(state.batches)), [], 0
    state.model.train()
    for images, labels in state.batches.epoch(0):
        _, grads = gradients(unclipped, copy.deepcopy(state.model), images, labels)
        norms.append(math.sqrt(sum(g.double().square().sum().item() for g in grads)))
        # Batch norm uses the statistics of each micro-batch.
        parts = zip(images.chunk(cfg.grad_accum), labels.chunk(cfg.grad_accum), strict=True)
        for inputs, targets in parts:
            with state.autocast:
                logits = copy.deepcopy(state.model)(inputs)
            for row, y in zip(logits, targets, strict=True):
                chosen = int(row.argmax())
                right += y[chosen].item() if y.ndim else chosen == int(y)
        epoch_state = epoch_state.after_step(train.take_step(cfg, state, images, labels), 0.1)
    metrics = epoch_state.training_metrics()
    assert metrics["train/top1"] == pytest.approx(100 * right / 96)
    tolerance = 0.02 if "precision=fp16" in words else 1e-4
    assert metrics["train/grad_norm"] == pytest.approx(sum(norms) / 3, rel=tolerance)


def figures(loss, top1, grad_norm, **further):
    """Return the metrics of a step."""
    values = {"loss": loss, "top1": top1, "grad_norm": grad_norm, **further}
    return {name: torch.tensor(value) for name, value in values.items()}


def test_a_further_number_of_the_steps_is_a_metric_and_outlives_a_checkpoint(tmp_path):
    progress = Progress.begin(2)
    for step, value in enumerate((1.0, 4.0)):
        state = progress.epoch_state.to(torch.device("cpu"))
        progress.epoch_state = state.after_step(figures(1.0, 0.5, 1.0, entropy=value), 0.1)
        torch.save(progress.state_dict(), tmp_path / f"{step}.pt")
        saved = torch.load(tmp_path / f"{step}.pt", weights_only=True)
        progress = parse(Progress, saved, "the checkpoint")
    row = {"epoch": 1, **progress.epoch_state.training_metrics(), "perf/epoch_seconds": 1.0}
    assert row["train/entropy"] == 2.5
    folder = run_folder.RunFolder(tmp_path)
    folder.write_metrics([row | {"test/loss": 1.0, "test/top1": 50.0, "test/top5": 60.0}])
    assert run_folder.read_metrics(tmp_path)[0]["train/entropy"] == 2.5


def test_a_run_that_an_earlier_version_began_keeps_its_columns(tmp_path):
    progress = Progress.begin(1)
    row = {"test/loss": 1.0, "test/top1": 50.0, "test/top5": 60.0, "perf/epoch_seconds": 1.0}
    row |= {"train/loss": 1.0, "train/top1": 50.0, "train/lr": 0.1}
    progress.finish_epoch({"epoch": 1} | row, [], 1)
    progress.finish_epoch({"epoch": 2, "attention/entropy": 0.9} | row, [], 1)
    run_folder.RunFolder(tmp_path).write_metrics(progress.rows)
    assert run_folder.read_metrics(tmp_path) == [{"epoch": epoch} | row for epoch in (1, 2)]


def test_a_gradient_that_overflows_is_in_no_mean():
    epoch_state = EpochState.begin(3)
    for norm in (math.inf, 3.0, math.nan, 4.0):
        epoch_state = epoch_state.after_step(figures(1.0, 0.5, norm), 0.1)
    assert epoch_state.training_metrics() == {
        "train/loss": 1.0,
        "train/top1": 50.0,
        "train/grad_norm": 3.5,
        "train/lr": 0.1,
    }
    only = EpochState.begin(1).after_step(figures(1.0, 0.5, math.inf), 0.1)
    assert only.training_metrics()["train/grad_norm"] == 0.0


@pytest.mark.parametrize(("log_every", "taken"), [(1, 2), slow(3, 3), slow(4, 4), (99, 6)])
def test_a_loss_that_is_not_finite_is_found_when_losses_are_looked_at(
    run, monkeypatch, log_every, taken
):
    """The error names the first such step, even if later losses are not finite either."""
    step, losses = train.take_step, []

    def breaking(*arguments):
        losses.append(step(*arguments))
        bad = len(losses) in (2, 4)
        return losses[-1] | {"loss": torch.tensor(math.inf)} if bad else losses[-1]

    monkeypatch.setattr(train, "take_step", breaking)
    with pytest.raises(FloatingPointError, match="not finite in epoch 1, step 2 of 6;"):
        run("attention=none", f"log_every={log_every}", "batch_size=16")
    assert len(losses) == taken


@pytest.mark.parametrize("values", [(30.0, 20.0), (20.0, 30.0)])
def test_the_peak_is_that_of_training_or_of_the_evaluation(run, tmp_path, monkeypatch, values):
    said = iter(values)
    monkeypatch.setattr(train, "peak_memory_mib", lambda _: next(said))
    run("epochs=1", "attention=none")
    (row,) = run_folder.read_metrics(tmp_path / "run")
    assert row["perf/peak_memory_mib"] == 30.0


def test_every_epoch_trains_in_training_mode_and_is_evaluated_in_the_other(run, monkeypatch):
    modes, step, evaluate = [], train.take_step, train.evaluate

    def stepping(cfg, state, *batch):
        modes.append(state.model.training)
        return step(cfg, state, *batch)

    def evaluating(model, *arguments):
        scores = evaluate(model, *arguments)
        modes.append(model.training)
        return scores

    monkeypatch.setattr(train, "take_step", stepping)
    monkeypatch.setattr(train, "evaluate", evaluating)
    run()
    assert modes == [True, True, True, False] * 2
    assert "epochs=2" in TINY
