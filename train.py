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
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from aaconv.attention import check_backend
from configs.schema import register
from data import Batches, evaluation_batches
from models import count_flops, count_parameters, layer_table
from training import checkpoint, cli, distributed, provenance, stopping
from training.device import (
    choose_device,
    choose_dtype,
    peak_memory_mb,
    place,
    set_deterministic,
)
from training.files import FAILED, write_csv, write_json
from training.scores import evaluate
from training.settings import build_model, check, resolve
from training.tracking import track

log = logging.getLogger("train")
register()


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
    evaluation = dataset.evaluation.part(world.rank, world.size)
    optimizer = instantiate(cfg.optim, _convert_="all")(model.parameters())
    schedule = instantiate(cfg.schedule)(optimizer, cfg.epochs * len(batches))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # Only fp16 has too little range for gradients.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = None
    if cfg.ema is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True)
    network: Any = distributed.averaging(model, device)
    if cfg.compile:
        network = torch.compile(network)
    evaluated: Callable[..., Tensor] = network if world.size == 1 else model
    if average is not None:
        evaluated = average

    # ---- Where it begins: with nothing, or behind a step of before ------------------------------
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": scaler,
    }
    if average is not None:
        parts["average"] = average
    rows: list[dict[str, Any]] = []
    per_class: list[float | None] | None = None
    so_far = begin_epoch(len(batches))
    run_id = None
    if resumed is not None:
        checkpoint.restore(state, parts, device, resumed)
        rows, per_class = state["rows"], state["per_class_top1"]
        so_far, run_id = state["so_far"], state["wandb_id"]
        log.info("resumed %s behind epoch %d, step %d", resumed, len(rows), so_far["step"])
    if world.writes:
        for path in (*in_the_way, run_dir / FAILED):  # now that nothing is wrong with the settings
            path.unlink(missing_ok=True)
    if rows and world.writes:
        write_csv(run_dir / "metrics.csv", rows)  # a kill may have come between the two files

    # ---- What will run ------------------------------------------------------------------------
    facts = {
        "model": cfg.model.name,
        "attention": cfg.attention._target_.rpartition(".")[2].lower(),
        "data": dataset.name,
        "evaluated_on": dataset.evaluated_on,
        "parameters": count_parameters(model),
        "flops": count_flops(model, dataset.image_size),
        "precision": str(dtype).removeprefix("torch."),
        "hardware": provenance.hardware(device),
        "processes": world.size,
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
    for line in layer_table(model):
        log.info(line)

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
        save = partial(checkpoint.save, run_dir, parts, device, config=config, wandb_id=tracker.id)
        saved = time.monotonic()
        for epoch in range(len(rows), cfg.epochs):
            # ---- An epoch, or what a checkpoint inside of it has left to do -------------------
            loss_sum = so_far["loss_sum"].to(device)
            # The first step whose loss is not finite, kept on the device: reading the loss at
            # every step would make the GPU wait for the CPU.
            broken_at = so_far["broken_at"].to(device)
            started = time.perf_counter() - so_far["seconds"]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            model.train()
            progress = tqdm(
                batches.epoch(epoch, so_far["step"]),
                f"epoch {epoch + 1}/{cfg.epochs}",
                initial=so_far["step"],
                total=len(batches),
                disable=None if world.writes else True,
                leave=False,
            )
            stops = False
            for step, (images, labels) in enumerate(progress, start=so_far["step"]):
                step_loss = distributed.mean(
                    add_gradients(network, images, labels, cfg, autocast, scaler)
                )
                if cfg.grad_clip is not None:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                if average is not None:
                    average.update_parameters(model)
                loss_sum = loss_sum + step_loss
                broken_at = torch.where(step_loss.isfinite(), broken_at, broken_at.clamp(max=step))

                done = step + 1 == len(batches)
                stops = distributed.agreed(stop.why() is not None)
                age = time.monotonic() - saved
                due = world.writes and age >= 60 * (cfg.checkpoint_minutes or math.inf)
                if done or stops or due or (step + 1) % cfg.log_every == 0:
                    stop_if_broken(broken_at, epoch, len(batches))
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
                    save(rows=rows, per_class_top1=per_class, so_far=so_far)
                    saved, started = time.monotonic(), time.perf_counter() - so_far["seconds"]

            # ---- Its score, and everything to go on from here ---------------------------------
            if not stops:
                distributed.same_buffers(model if average is None else average)
                scores, per_class_now = evaluate(
                    evaluated,
                    stop.until_signalled(
                        evaluation_batches(
                            evaluation, cfg.eval_batch_size, dataset.mean, dataset.std
                        )
                    ),
                    autocast,
                )
                # One broken off begins anew.
                stops = distributed.agreed(stop.signal is not None)
            if stops:
                if world.writes:
                    save(rows=rows, per_class_top1=per_class, so_far=so_far)
                break
            row = {
                "epoch": epoch + 1,
                "train_loss": loss_sum.item() / len(batches),
                **scores,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_s": len(batches) * cfg.batch_size / so_far["seconds"],
                "peak_memory_mb": max(so_far["peak_memory_mb"], peak_memory_mb(device)),
                "seconds": time.perf_counter() - started,
            }
            rows, per_class, so_far = [*rows, row], per_class_now, begin_epoch(len(batches))
            if world.writes:
                save(rows=rows, per_class_top1=per_class, so_far=so_far)
                write_csv(run_dir / "metrics.csv", rows)
                tracker.log(row)
            saved = time.monotonic()
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


def begin_epoch(steps: int) -> dict[str, Any]:
    """What an epoch has come to before its first step; checkpoints inside of it hold the same."""
    return {
        "step": 0,
        "loss_sum": torch.zeros(()),
        "broken_at": torch.tensor(steps),
        "seconds": 0.0,
        "peak_memory_mb": 0.0,
    }


def add_gradients(
    network: Any,
    images: Tensor,
    labels: Tensor,
    cfg: DictConfig,
    autocast: torch.autocast,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """The mean loss of a batch, whose gradients are added up piece by piece."""
    mean = torch.zeros((), device=images.device)
    pieces = zip(images.chunk(cfg.grad_accum), labels.chunk(cfg.grad_accum), strict=True)
    for number, (piece, target) in enumerate(pieces, start=1):
        last = number == cfg.grad_accum
        with nullcontext() if last else distributed.unaveraged(network):
            with autocast:
                logits = network(piece)
            loss = F.cross_entropy(logits.float(), target, label_smoothing=cfg.label_smoothing)
            loss = loss / cfg.grad_accum
            scaler.scale(loss).backward()
        mean += loss.detach()
    return mean


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
