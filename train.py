"""Train one network on one data set: the story of a run, from its settings to its summary.

    python train.py model=wrn28_10 attention=aa data=cifar100 epochs=200 seed=0
    python train.py -m attention=none,aa seed=0,1,2
    torchrun --nproc_per_node=4 train.py attention=aa

configs/ holds the settings, configs/schema.py says what each one means. Everything that a run
writes lies in its folder below outputs/: metrics.csv, summary.json, last.pt and previous.pt (its
checkpoints), train.log; where the loss stopped being finite, failed.json instead of a summary.
Of several processes, which torchrun starts, the first writes and speaks.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from aaconv.functional import check_backend
from configs.schema import register
from data import Batches, Dataset, evaluation_batches
from models import count_flops, count_parameters, layer_table
from training import checkpoint, cli, distributed, provenance, stopping
from training.device import (
    choose_device,
    choose_dtype,
    peak_memory_mb,
    place,
    set_deterministic,
)
from training.files import write_csv, write_json
from training.run_folder import FAILURE
from training.scores import evaluate
from training.settings import build_model, check, resolve
from training.tracking import track

log = logging.getLogger("train")
register()


class Parts(NamedTuple):
    """What a run is made of."""

    world: distributed.World
    device: torch.device
    dataset: Dataset
    batches: Batches
    model: nn.Module
    network: Any  # the model as training calls it: compiled, averaging over processes
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    autocast: torch.autocast
    scaler: torch.amp.GradScaler

    def kept(self) -> dict[str, Any]:
        """Those whose states a checkpoint keeps."""
        names = ("model", "optimizer", "schedule", "scaler", "average")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def train(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Run ``cfg`` in ``run_dir`` and return what its summary.json says.

    Raises:
        ValueError: settings that contradict each other or what is at hand.
        FileNotFoundError: no data or no checkpoint where ``cfg`` says.
        FloatingPointError: the loss stopped being finite; the message names epoch and step.
        OSError: the disk is full or ``run_dir`` cannot be written; the checkpoints are whole.
        SystemExit: a signal or ``max_minutes`` stopped the run, which ``resume`` continues; the
            code is that of `training.stopping.Stop`.
        ConnectionError: another of several processes has died.
    """
    # ---- What is asked for, and whether it can be had -----------------------------------------
    config = resolve(cfg)
    world = distributed.world()
    check(cfg, world.size)
    device = choose_device(cfg.device, world)
    dtype = choose_dtype(config["precision"], device)
    if "backend" in cfg.attention:
        check_backend(cfg.attention.backend, device, dtype, needs_grad=True)
    resumed, state, in_the_way = distributed.from_first(
        lambda: checkpoint.begin(cfg.resume, run_dir, config, cfg.overwrite)
    )
    with distributed.first_of_machine():  # which may have to download it
        dataset = instantiate(cfg.data, _convert_="all").to(device)
    parts = build(cfg, dataset, world, device, dtype)
    steps = len(parts.batches)

    # ---- Where it begins: with nothing, or behind a step of before ----------------------------
    rows: list[dict[str, Any]] = []
    per_class: list[float | None] | None = None
    so_far, run_id = begin_epoch(steps), None
    if resumed is not None:
        checkpoint.restore(state, parts.kept(), device, resumed)
        rows, per_class = state["rows"], state["per_class_top1"]
        so_far, run_id = state["so_far"], state["wandb_id"]
        log.info("resumed %s behind epoch %d, step %d", resumed, len(rows), so_far["step"])
    if world.writes:
        for path in (*in_the_way, run_dir / FAILURE):  # now that nothing is wrong with the settings
            path.unlink(missing_ok=True)
    if rows and world.writes:
        write_csv(run_dir / "metrics.csv", rows)  # a kill may have come between the two files
    facts = describe(cfg, parts, dtype)

    with (
        stopping.Stop(cfg.max_minutes, launched=world.size > 1) as stop,
        track(
            config["wandb"]["mode"] if world.writes else "disabled",
            folder=Path(cfg.out_dir),
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            group=cfg.wandb.group,
            name=f"{run_dir.parent.name} {run_dir.name}",
            config=config | {"facts": facts},
            run_id=run_id,
        ) as tracker,
    ):
        for epoch in range(len(rows), cfg.epochs):
            # ---- An epoch, its score, and everything to go on from here -----------------------
            save = partial(
                checkpoint.save, run_dir, parts.kept(), device, config=config, wandb_id=tracker.id
            )
            inside = partial(save, rows=rows, per_class_top1=per_class)
            so_far, stops = train_epoch(cfg, parts, epoch, so_far, stop, inside)
            trained = time.perf_counter()
            if not stops:
                scores, per_class_now = score(cfg, parts, stop)
                # One that a signal has broken off begins anew.
                stops = distributed.agreed(stop.signal is not None)
            if stops:
                if world.writes:
                    inside(so_far=so_far)
                break
            row = {
                "epoch": epoch + 1,
                "train_loss": so_far["loss_sum"].item() / steps,
                **scores,
                "lr": parts.optimizer.param_groups[0]["lr"],
                "images_per_s": steps * cfg.batch_size / so_far["seconds"],
                "peak_memory_mb": max(so_far["peak_memory_mb"], peak_memory_mb(device)),
                "seconds": so_far["seconds"] + time.perf_counter() - trained,
            }
            rows, per_class, so_far = [*rows, row], per_class_now, begin_epoch(steps)
            if world.writes:
                save(rows=rows, per_class_top1=per_class, so_far=so_far)
                write_csv(run_dir / "metrics.csv", rows)
                tracker.log(row)
            log.info(
                "epoch %d/%d: loss %.4f, %s top-1 %.2f, top-5 %.2f, lr %.3g, %.0f images/s",
                epoch + 1,
                cfg.epochs,
                row["train_loss"],
                dataset.evaluated_on,
                row["top1"],
                row["top5"],
                row["lr"],
                row["images_per_s"],
            )
            if distributed.agreed(stop.why() is not None):
                break

        # ---- The last epoch's figures, never the best one's ------------------------------------
        finished = len(rows) == cfg.epochs
        if finished:
            last = {k: rows[-1][k] for k in ("train_loss", "eval_loss", "top1", "top5")}
            summary = {
                **last,
                "epochs": len(rows),
                "seed": cfg.seed,
                "seconds": sum(row["seconds"] for row in rows),
                "per_class_top1": per_class,
                "class_names": list(dataset.class_names),
                **facts,
                "config": config,
            }
            if world.writes:
                write_json(run_dir / "summary.json", summary)
                tracker.summarize(last | {"seconds": summary["seconds"]})
            log.info("top-1 %.2f, top-5 %.2f: %s", last["top1"], last["top5"], run_dir)
        else:
            log.info(
                "stopped (%s) behind epoch %d, step %d; the same command with resume=auto goes "
                "on: %s",
                stop.why(),
                len(rows),
                so_far["step"],
                run_dir,
            )

    stop.leave(finished)
    return summary


def build(
    cfg: DictConfig,
    dataset: Dataset,
    world: distributed.World,
    device: torch.device,
    dtype: torch.dtype,
) -> Parts:
    """Everything that trains, at its beginning."""
    torch.manual_seed(cfg.seed)
    set_deterministic(cfg.deterministic)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where precision is fp32
    model = build_model(cfg, num_classes=dataset.num_classes, image_size=dataset.image_size)
    model = place(model, device, cfg.channels_last)
    if cfg.sync_batchnorm:
        model = distributed.synchronise_normalisation(model, device)
    batches = Batches(
        dataset.train,
        cfg.batch_size,
        dataset.augmentation,
        dataset.mean,
        dataset.std,
        cfg.seed,
        part=(world.rank, world.size),
        pieces=cfg.grad_accum,
    )
    optimizer = instantiate(cfg.optim, _convert_="all")(model.parameters())
    average = None
    if cfg.ema is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True)
    network = distributed.averaging(model, device)
    return Parts(
        world=world,
        device=device,
        dataset=dataset,
        batches=batches,
        model=model,
        network=torch.compile(network) if cfg.compile else network,
        average=average,
        optimizer=optimizer,
        schedule=instantiate(cfg.schedule)(optimizer, cfg.epochs * len(batches)),
        autocast=torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        # Only fp16 has too little range for gradients.
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )


def describe(cfg: DictConfig, parts: Parts, dtype: torch.dtype) -> dict[str, Any]:
    """What will run, and on what; logged, and returned for summary and dashboard."""
    facts = {
        "model": cfg.model.name,
        "attention": instantiate(cfg.attention, _convert_="all").name,
        "data": parts.dataset.name,
        "evaluated_on": parts.dataset.evaluated_on,
        "parameters": count_parameters(parts.model),
        "flops": count_flops(parts.model, parts.dataset.image_size),
        "precision": str(dtype).removeprefix("torch."),
        "hardware": provenance.hardware(parts.device),
        "processes": parts.world.size,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
    }
    log.info(
        "%s (%s) on %s: %s parameters, %.4g GFLOPs an image, %s on %s",
        facts["model"],
        facts["attention"],
        facts["data"],
        f"{facts['parameters']:,}",
        facts["flops"] / 1e9,
        facts["precision"],
        facts["hardware"],
    )
    for line in layer_table(parts.model):
        log.info(line)
    return facts


def begin_epoch(steps: int) -> dict[str, Any]:
    """What an epoch has come to before its first step; checkpoints inside of it hold the same."""
    return {
        "step": 0,
        "loss_sum": torch.zeros(()),
        "broken_at": torch.tensor(steps),
        "seconds": 0.0,
        "peak_memory_mb": 0.0,
    }


def train_epoch(
    cfg: DictConfig,
    parts: Parts,
    epoch: int,
    so_far: dict[str, Any],
    stop: stopping.Stop,
    save: Callable[..., None],
) -> tuple[dict[str, Any], bool]:
    """Train from where ``so_far`` is in the epoch to its end, or to where ``stop`` asks for an end.

    ``save`` is called every ``checkpoint_minutes``. Returns what the epoch has come to, and whether
    it was stopped.
    """
    device, steps = parts.device, len(parts.batches)
    loss_sum = so_far["loss_sum"].to(device)
    # The first step whose loss is not finite, kept on the device: reading the loss at every step
    # would make the GPU wait for the CPU.
    broken_at = so_far["broken_at"].to(device)
    started, saved = time.perf_counter() - so_far["seconds"], time.monotonic()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts.model.train()
    progress = tqdm(
        parts.batches.epoch(epoch, so_far["step"]),
        f"epoch {epoch + 1}/{cfg.epochs}",
        initial=so_far["step"],
        total=steps,
        disable=None if parts.world.writes else True,
        leave=False,
    )
    stops = False
    for step, (images, labels) in enumerate(progress, start=so_far["step"]):
        step_loss = take_step(cfg, parts, images, labels)
        loss_sum = loss_sum + step_loss
        broken_at = torch.where(step_loss.isfinite(), broken_at, broken_at.clamp(max=step))

        done = step + 1 == steps
        stops = distributed.agreed(stop.why() is not None)
        age = time.monotonic() - saved
        due = parts.world.writes and age >= 60 * (cfg.checkpoint_minutes or math.inf)
        if done or stops or due or (step + 1) % cfg.log_every == 0:
            stop_if_broken(broken_at, epoch, steps)
            seen, seconds = (step + 1) * cfg.batch_size, time.perf_counter() - started
            progress.set_postfix_str(
                f"loss {loss_sum.item() / (step + 1):.3f}, {seen / seconds:.0f} images/s"
            )
        if done or stops or due:
            so_far = {
                "step": step + 1,
                "loss_sum": loss_sum,
                "broken_at": broken_at,
                "seconds": time.perf_counter() - started,
                "peak_memory_mb": max(so_far["peak_memory_mb"], peak_memory_mb(device)),
            }
        if stops:
            break
        if due:
            save(so_far=so_far)
            started, saved = time.perf_counter() - so_far["seconds"], time.monotonic()
    return so_far, stops


def take_step(cfg: DictConfig, parts: Parts, images: Tensor, labels: Tensor) -> Tensor:
    """One step of the optimizer; the mean loss of the whole batch, before it."""
    loss = distributed.mean(add_gradients(cfg, parts, images, labels))
    if cfg.grad_clip is not None:
        parts.scaler.unscale_(parts.optimizer)
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), cfg.grad_clip)
    parts.scaler.step(parts.optimizer)
    parts.scaler.update()
    parts.optimizer.zero_grad(set_to_none=True)
    parts.schedule.step()
    if parts.average is not None:
        parts.average.update_parameters(parts.model)
    return loss


def add_gradients(cfg: DictConfig, parts: Parts, images: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of this process's part of a batch, whose gradients are added up by pieces."""
    mean = torch.zeros((), device=images.device)
    pieces = zip(images.chunk(cfg.grad_accum), labels.chunk(cfg.grad_accum), strict=True)
    for number, (piece, target) in enumerate(pieces, start=1):
        last = number == cfg.grad_accum
        with nullcontext() if last else distributed.unaveraged(parts.network):
            with parts.autocast:
                logits = parts.network(piece)
            loss = F.cross_entropy(logits.float(), target, label_smoothing=cfg.label_smoothing)
            loss = loss / cfg.grad_accum
            parts.scaler.scale(loss).backward()
        mean += loss.detach()
    return mean


def score(
    cfg: DictConfig, parts: Parts, stop: stopping.Stop
) -> tuple[dict[str, float], list[float | None]]:
    """What `evaluate` says of the network, or of its average where there is one."""
    distributed.same_buffers(parts.model if parts.average is None else parts.average)
    # Called as in training, it would ask the other processes for theirs at each batch.
    network = parts.network if parts.world.size == 1 else parts.model
    dataset = parts.dataset
    images = dataset.evaluation.part(parts.world.rank, parts.world.size)
    return evaluate(
        network if parts.average is None else parts.average,
        stop.until_signalled(
            evaluation_batches(images, cfg.eval_batch_size, dataset.mean, dataset.std)
        ),
        parts.autocast,
    )


def stop_if_broken(broken_at: Tensor, epoch: int, steps: int) -> None:
    """Raise FloatingPointError if a loss of this epoch was not finite."""
    step = int(broken_at)
    if step < steps:
        raise FloatingPointError(
            f"the loss is not finite at epoch {epoch + 1}, step {step + 1} of {steps}; "
            "a lower optim.lr or grad_clip may help"
        )


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> float:
    """Train ``cfg`` in Hydra's folder for it; the last epoch's top-1 accuracy in per cent."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    with cli.one_line_errors(run_dir, Path(cfg.out_dir)), distributed.joined():
        return train(cfg, run_dir)["top1"]


if __name__ == "__main__":
    cli.run(main)
