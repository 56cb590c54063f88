"""Train one network on one data set: the story of a run, from its settings to its summary.

    python train.py model=wrn28_10 attention=aa data=cifar100 epochs=200 seed=0
    python train.py -m attention=none,aa seed=0,1,2
    torchrun --nproc_per_node=4 train.py attention=aa

configs/ holds the settings, docs/settings.md says what each one means. Everything that a run
writes lies in its folder below outputs/, which training/run_folder.py describes. Of several
processes, which torchrun starts, the main one writes and prints.
"""

if __name__ == "__main__":
    from training import console

    console.prepare("train.py")
    from training import cli

    cli.run()  # which imports this file as a module when a run begins
    raise SystemExit

import logging
import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from aaconv.functional import check_backend
from data import Batches, Dataset, evaluation_batches
from models import Trained, freeze, set_frozen_eval
from training import checkpoint, distributed, provenance, run_folder, stopping
from training.dashboard import pictures, show, start_tracking
from training.device import (
    choose_device,
    choose_dtype,
    compiled,
    dtype_name,
    peak_memory_mib,
    set_deterministic,
    to_device,
)
from training.initial import init_provenance, load_initial, take_weights
from training.optimizer import make_optimizer
from training.progress import Progress
from training.scores import evaluate
from training.settings import build_model, check, resolve
from training.state import RunState
from training.summary import (
    best,
    describe_run,
    describe_training,
    epoch_line,
    raise_if_nonfinite,
    stop_line,
    summarize,
)

log = logging.getLogger("train")


def train(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Run ``cfg`` in ``run_dir`` and return what its summary.json holds.

    Raises:
        ValueError: settings that contradict each other or what is there; another process
            writes to ``run_dir``, or it holds another run.
        FileNotFoundError: no data or no checkpoint where ``cfg`` says.
        FloatingPointError: a loss or a score was not finite; the message names the epoch, and
            failed.json holds it.
        OSError: the disk is full or ``run_dir`` cannot be written; the checkpoints are whole.
        SystemExit: a signal or ``max_minutes`` stopped the run, which ``resume`` continues; the
            code is that of `training.stopping.Stop`.
        ConnectionError: another of several processes has died.
    """
    # ---- What is asked for, and whether it can be had -----------------------------------------
    config = resolve(cfg)
    world = distributed.world()
    with distributed.errors_in_all():  # one machine may have fewer GPUs than another
        check(cfg, world.size)
        device = choose_device(cfg.device, world)
        dtype = choose_dtype(config["precision"], device)
        if "backend" in cfg.attention:
            check_backend(cfg.attention.backend, device, dtype, needs_grad=True)

    with ExitStack() as stack:
        with distributed.errors_in_all():  # the main process alone writes
            folder = stack.enter_context(run_folder.claimed(run_dir)) if world.is_main else None
        resumed, saved, replaced = distributed.broadcast_from_main(
            lambda: checkpoint.begin(cfg.resume, run_dir, config, cfg.overwrite)
        )
        if resumed is not None and checkpoint.is_finished(run_dir, resumed, saved, cfg):
            return checkpoint.finished_before(run_dir)
        if resumed is not None:
            checkpoint.check_precision(saved, dtype_name(dtype), config["precision"], run_dir)
        initial = None
        if cfg.init_from is not None and resumed is None:
            with distributed.errors_in_all():
                initial = load_initial(cfg.init_from)

        # ---- Data, model, and the step to begin with: the first, or the one after `resumed` ----
        with distributed.local_main_first():  # which may have to download the data
            dataset = instantiate(cfg.data, _convert_="all").to(device)
        state = build(cfg, dataset, world, device, dtype, initial)
        progress = checkpoint.continue_run(state, resumed, saved, cfg.resume, run_dir, config)
        facts = describe_training(cfg, state)
        if len(progress.rows) < cfg.epochs:
            here = provenance.of_segment(device, facts["precision"], world.size)
            progress.start_segment(here | init_provenance(initial))
        if folder is not None:
            folder.start(cfg, replaced)
            if progress.rows:  # a kill may have come between the checkpoint and the rows
                folder.write_metrics(progress.rows)

        # ---- The epochs, each with its scores and a checkpoint to continue from ----------------
        stop = stack.enter_context(stopping.Stop(cfg.max_minutes, launched=world.size > 1))
        tracker = stack.enter_context(
            start_tracking(cfg, config, run_dir, facts, progress, world.is_main)
        )
        progress.wandb_id = tracker.id
        save = partial(checkpoint.save_progress, folder, state, config)
        while len(progress.rows) < cfg.epochs:
            stopped = train_epoch(cfg, state, progress, stop, save)
            if stopped or not finish_epoch(cfg, state, progress, stop):
                save(progress)
                break
            raise_if_nonfinite(progress.rows[-1])
            save(progress)
            if folder is not None:
                folder.write_metrics(progress.rows)
                tracker.log(progress.rows[-1], pictures(cfg, state, progress, tracker))
            log.info("%s", epoch_line(progress.rows[-1], cfg.epochs, dataset.evaluated_on))
            if distributed.any_rank(stop.why() is not None):
                break

        # ---- The last epoch's figures, never the best one's -------------------------------------
        finished = len(progress.rows) == cfg.epochs
        if not finished:
            tracker.stopped(continued=stop.will_resume)
        summary = summarize(cfg, config, progress, dataset, facts) if finished else {}
        if finished and folder is not None:
            folder.write_weights(state.evaluated_model, state.description)
            folder.write_summary(summary)
            tracker.summarize({k: v for k, v in summary.items() if "/" in k} | best(progress.rows))
            show(cfg, state, tracker, config, facts, folder.path)
        log.info(
            "%s: %s",
            run_folder.scores_line(summary) if finished else stop_line(stop, progress),
            run_dir,
        )

    stop.leave(finished)
    return {"format": run_folder.FORMAT, **summary}


def build(
    cfg: DictConfig,
    dataset: Dataset,
    world: distributed.World,
    device: torch.device,
    dtype: torch.dtype,
    initial: Trained | None = None,
) -> RunState:
    """Everything that trains, at its beginning, with what fits of the weights of ``initial``."""
    torch.manual_seed(cfg.seed)
    set_deterministic(cfg.deterministic)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where precision is fp32
    network = build_model(cfg, num_classes=dataset.num_classes, image_size=dataset.image_size)
    if initial is not None:
        take_weights(network, initial, dataset, cfg.init_from)
    freeze(network, cfg.freeze)
    model = to_device(network, device, cfg.channels_last)
    if cfg.sync_batchnorm:
        model = distributed.convert_sync_batchnorm(model, device)
    batches = Batches(
        dataset.train,
        cfg.batch_size,
        instantiate(cfg.augmentation, _convert_="all"),
        dataset.mean,
        dataset.std,
        cfg.seed,
        shard=(world.rank, world.size),
        micro_batches=cfg.grad_accum,
    )
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if cfg.compile:  # a compiled network tries no backend
        try_backends(model, dataset, autocast)
    optimizer = make_optimizer(cfg.optim, model)
    ema_model = None
    if cfg.ema is not None:
        ema_model = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True
        )
    wrapped_model = distributed.wrap_ddp(model, device)
    return RunState(
        world=world,
        device=device,
        dtype=dtype,
        dataset=dataset,
        batches=batches,
        description=describe_run(cfg, network, dataset, dtype),
        model=model,
        wrapped_model=compiled(wrapped_model) if cfg.compile else wrapped_model,
        ema_model=ema_model,
        optimizer=optimizer,
        schedule=instantiate(cfg.schedule)(optimizer, cfg.epochs * len(batches)),
        autocast=autocast,
        # Only fp16 has too little range for gradients.
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )


def try_backends(model: nn.Module, dataset: Dataset, autocast: torch.autocast) -> None:
    """One image through ``model``, which stays as it is: attention tries its backend."""
    images, _ = next(iter(evaluation_batches(dataset.evaluation, 1, dataset.mean, dataset.std)))
    with torch.no_grad(), autocast:
        model.eval()(images)
    model.train()


def train_epoch(
    cfg: DictConfig,
    state: RunState,
    progress: Progress,
    stop: stopping.Stop,
    save: Callable[[Progress], None],
) -> bool:
    """Train from where ``progress`` is in its epoch to the end, or to where ``stop`` asks for one.

    ``save`` is called every ``checkpoint_minutes``. Returns whether the epoch was stopped.
    """
    device, steps, epoch = state.device, len(state.batches), len(progress.rows)
    before = progress.epoch_state.to(device)
    epoch_state = before
    started, saved = time.perf_counter() - before.seconds, time.monotonic()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    state.model.train()
    set_frozen_eval(state.model, cfg.freeze)
    bar = tqdm(
        state.batches.epoch(epoch, before.step),
        f"epoch {epoch + 1}/{cfg.epochs}",
        initial=before.step,
        total=steps,
        disable=None if state.world.is_main else True,
        leave=False,
    )
    should_stop = False
    for images, labels in bar:
        lr = state.optimizer.param_groups[0]["lr"]
        epoch_state = epoch_state.after_step(take_step(cfg, state, images, labels), lr)
        should_stop = distributed.any_rank(stop.why() is not None)
        age = time.monotonic() - saved
        due = state.world.is_main and age >= 60 * (cfg.checkpoint_minutes or math.inf)
        leaving = epoch_state.step == steps or should_stop or due
        if leaving or epoch_state.step % cfg.log_every == 0:
            epoch_state.raise_if_nonfinite(epoch, steps)
            rate = epoch_state.step * cfg.batch_size / (time.perf_counter() - started)
            mean_loss = epoch_state.loss_sum.item() / epoch_state.step
            bar.set_postfix_str(f"loss {mean_loss:.3f}, {rate:.0f} images/s")
        if leaving:
            progress.epoch_state = replace(
                epoch_state,
                seconds=time.perf_counter() - started,
                peak_memory_mib=max(before.peak_memory_mib, peak_memory_mib(device)),
            )
        if should_stop:
            break
        if due:
            save(progress)
            started, saved = time.perf_counter() - progress.epoch_state.seconds, time.monotonic()
    return should_stop


def take_step(
    cfg: DictConfig, state: RunState, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """One step of the optimizer, and what it has shown of the whole batch.

    Each number is a metric ``train/NAME`` by its mean over an epoch; see `EpochState.after_step`.
    """
    loss, top1 = distributed.all_reduce_mean(add_gradients(cfg, state, images, labels)).unbind()
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if cfg.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, cfg.grad_clip, grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        # Where fp16 overflows in the very first step, the optimizer has not taken one.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        state.schedule.step()
    if state.ema_model is not None:
        state.ema_model.update_parameters(state.model)
    return {"loss": loss, "top1": top1, "grad_norm": grad_norm}


def add_gradients(cfg: DictConfig, state: RunState, images: Tensor, labels: Tensor) -> Tensor:
    """Mean loss and fraction right of this rank's shard of a batch, as a tensor (2,).

    The gradients of the loss add up over micro-batches.
    """
    mean = torch.zeros(2, device=images.device)
    micro_batches = zip(images.chunk(cfg.grad_accum), labels.chunk(cfg.grad_accum), strict=True)
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        last = number == cfg.grad_accum
        with nullcontext() if last else distributed.no_sync(state.wrapped_model):
            with state.autocast:
                logits = state.wrapped_model(inputs)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=cfg.label_smoothing)
            loss = loss / cfg.grad_accum
            state.scaler.scale(loss).backward()
        right = (logits.detach().argmax(dim=1) == targets).float().mean() / cfg.grad_accum
        mean += torch.stack((loss.detach(), right))
    return mean


def finish_epoch(cfg: DictConfig, state: RunState, progress: Progress, stop: stopping.Stop) -> bool:
    """Score the model and add the epoch's row; False if a signal interrupted the evaluation.

    That one is begun again by whoever continues the run.
    """
    trained, evaluating = progress.epoch_state, time.perf_counter()
    scores, per_class_top1 = score(cfg, state, stop)
    if distributed.any_rank(stop.signal is not None):
        return False
    steps = len(state.batches)
    row = {
        "epoch": len(progress.rows) + 1,
        **trained.training_metrics(),
        **{f"{state.dataset.evaluated_on}/{name}": value for name, value in scores.items()},
        "perf/images_per_s": steps * cfg.batch_size / trained.seconds,
        "perf/peak_memory_mib": max(trained.peak_memory_mib, peak_memory_mib(state.device)),
        "perf/epoch_seconds": trained.seconds + time.perf_counter() - evaluating,
    }
    progress.finish_epoch(row, per_class_top1, steps)
    return True


def score(
    cfg: DictConfig, state: RunState, stop: stopping.Stop
) -> tuple[dict[str, float], list[float | None]]:
    """What `evaluate` says of the model, or of its averaged weights where there are some."""
    distributed.broadcast_buffers(state.model if state.ema_model is None else state.ema_model)
    # Called as in training, it would ask the other processes for theirs at each batch.
    model = state.wrapped_model if state.world.size == 1 else state.model
    dataset = state.dataset
    images = dataset.evaluation.shard(state.world.rank, state.world.size)
    return evaluate(
        model if state.ema_model is None else state.ema_model,
        stop.until_signalled(
            evaluation_batches(images, cfg.eval_batch_size, dataset.mean, dataset.std)
        ),
        state.autocast,
    )
