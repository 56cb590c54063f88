"""Train one network on one data set, from the settings to the summary of the run.

    python train.py model=wrn28_10 attention=aa data=cifar100 epochs=200 seed=0
    python train.py -m attention=none,aa seed=0,1,2
    torchrun --nproc_per_node=4 train.py attention=aa

The settings are in configs/; docs/settings.md explains each of them. A run writes everything to its
own folder under outputs/, which training/run_folder.py describes. When torchrun starts several
processes, only the main process (rank 0) writes and prints.
"""

if __name__ == "__main__":
    from training import console

    console.prepare("train.py")
    from training import cli

    cli.run()  # imports this file as a module when a run begins
    raise SystemExit

import logging
import time
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from aaconv.functional import check_backend
from data import evaluation_batches
from data.dataset import seeded_generator
from models import set_frozen_eval
from training import checkpoint, distributed, provenance, run_folder
from training.assemble import RunState, build_state
from training.compose import make
from training.dashboard import history, pictures, show, start_tracking
from training.device import choose_device, choose_dtype, dtype_name, peak_memory_mib, set_seed
from training.initial import init_provenance, load_initial
from training.loss import accuracy, cross_entropy, relative_weights
from training.media import attention_entropy
from training.progress import EpochState, Progress
from training.scores import evaluate
from training.settings import check, resolve
from training.stopping import Action, Stop
from training.summary import best, describe_training, epoch_line, raise_if_nonfinite, summarize
from training.tracking import STEP_LOSS, Tracker

log = logging.getLogger("train")


def train(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Run ``cfg`` in ``run_dir`` and return the contents of its summary.json.

    Raises:
        ValueError: if settings contradict each other, the data or the hardware; or if ``run_dir``
            holds another run or is in use by another process.
        FileNotFoundError: if there is no data or no checkpoint where ``cfg`` points.
        FloatingPointError: if a loss or a score is not finite; the message, which names the
            epoch, is also in failed.json.
        OSError: if the disk is full or ``run_dir`` is not writable; the checkpoints stay intact.
        SystemExit: if a signal or ``max_minutes`` stopped the run; ``resume`` continues it. The
            exit code is that of `training.stopping.Stop`.
        ConnectionError: if another process of the run has died.
    """
    # ---- Check the settings; start from scratch or from the checkpoint `resumed` ---------------
    config, world = resolve(cfg), distributed.world()
    with distributed.errors_in_all():  # one machine may have fewer GPUs than another
        check(cfg, world.size)
        device = choose_device(cfg.device, world)
        dtype = choose_dtype(config["precision"], device)
        if "backend" in cfg.attention:
            check_backend(cfg.attention.backend, device, dtype)
    with ExitStack() as stack:
        with distributed.errors_in_all():  # only the main process writes
            folder = stack.enter_context(run_folder.claimed(run_dir)) if world.is_main else None
        before = distributed.broadcast_from_main(
            lambda: checkpoint.finished_before(run_dir, config)
        )
        if before is not None:
            return before
        resumed, saved, replaced = distributed.broadcast_from_main(
            lambda: checkpoint.begin(run_dir, config)
        )
        if resumed is not None:
            checkpoint.check_precision(saved, dtype_name(dtype), config["precision"], run_dir)
            # Keep the setting that the run was started with: results are listed by it.
            cfg.precision = config["precision"] = saved["config"]["precision"]
        with distributed.errors_in_all():
            initial = load_initial(cfg) if resumed is None else None

        # ---- Data, network, optimizer and progress ---------------------------------------------
        with distributed.errors_in_all(), distributed.local_main_first():  # it may download
            dataset = make(cfg.data).to(device)
        state = build_state(cfg, dataset, world, device, dtype, initial)
        progress = checkpoint.continue_run(state, resumed, saved, run_dir, config)
        facts = describe_training(cfg, state)
        if len(progress.rows) < cfg.epochs:
            here = provenance.of_segment(device, facts["precision"], world.size)
            progress.start_segment(here | init_provenance(initial))
        if folder is not None:
            folder.start(cfg, replaced, dataset.digest)
            if resumed is not None and not checkpoint.is_in(resumed, run_dir):
                checkpoint.save(folder.path, state, config, progress)  # before its metrics.csv
                folder.keep()
            folder.write_metrics(progress.rows)  # a killed run may have left more or fewer rows

        # ---- Train the epochs and save checkpoints ---------------------------------------------
        stop = stack.enter_context(Stop(cfg.max_minutes, world.size > 1, cfg.checkpoint_minutes))
        tracker = stack.enter_context(start_tracking(cfg, config, run_dir, facts, progress, state))
        progress.wandb_id = tracker.id
        action = Action.CONTINUE
        while (epoch := len(progress.rows)) < cfg.epochs and action is not Action.STOP:
            action = train_epoch(cfg, state, progress, stop, tracker)
            if action is Action.CONTINUE:  # all steps of the epoch are done
                action = finish_epoch(cfg, state, progress, stop)
            if action is not Action.CONTINUE:
                if folder is not None:
                    checkpoint.save(folder.path, state, config, progress)
                    folder.keep()
                stop.saved()
            if len(progress.rows) > epoch:
                report_epoch(cfg, state, progress, folder, tracker)

        # ---- Report the last epoch's scores, never the best epoch's ----------------------------
        finished = len(progress.rows) == cfg.epochs
        if finished:
            summary = finish_run(cfg, config, state, progress, facts, folder, tracker)
            log.info("%s: %s", run_folder.scores_line(summary), run_dir)
        else:
            tracker.stopped(stop.why(), continued=stop.will_resume)
            again = "run the same command with resume=auto to continue"
            log.info("stopped (%s) %s; %s: %s", stop.why(), progress.position, again, run_dir)

    stop.leave(finished)
    return summary


def train_epoch(
    cfg: DictConfig, state: RunState, progress: Progress, stop: Stop, tracker: Tracker
) -> Action:
    """Train the rest of the current epoch, or until a checkpoint or a stop is due.

    Returns the next action: save or stop at this step, or continue with the evaluation.
    """
    device, steps, epoch = state.device, len(state.batches), len(progress.rows)
    before = epoch_state = progress.epoch_state.to(device)
    started = time.perf_counter() - before.seconds
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
    action = Action.CONTINUE
    for images, labels in bar:
        # Dropout is seeded at every step, so a checkpoint needs no random state for it.
        draws = seeded_generator("dropout", cfg.seed, epoch, epoch_state.step, state.world.rank)
        set_seed(device, draws.initial_seed())
        lr = state.optimizer.param_groups[0]["lr"]
        epoch_state = epoch_state.after_step(take_step(cfg, state, images, labels), lr)
        step, action = epoch_state.step, stop.after_step()
        reads = step == steps or step % cfg.log_every == 0
        if reads or action is not Action.CONTINUE:
            epoch_state.raise_if_nonfinite(epoch, steps)
            rate = step * cfg.batch_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {epoch_state.mean('loss'):.3f}, {rate:.0f} images/s")
            if reads:  # not at checkpoints: an interrupted run must report at the same steps
                report_loss(progress, epoch_state, steps, tracker)
        if action is not Action.CONTINUE:
            break
    progress.epoch_state = replace(
        epoch_state,
        seconds=time.perf_counter() - started,
        peak_memory_mib=max(before.peak_memory_mib, peak_memory_mib(device)),
    )
    return action


def take_step(
    cfg: DictConfig, state: RunState, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Take one optimizer step and return its metrics as scalars on the device.

    They cover the whole batch over all processes: ``loss``, the mean loss before the step, weighted
    by class if there are class weights; ``top1``, the fraction of images classified correctly
    before the step; ``grad_norm``, the L2 norm of all gradients together before clipping. The mean
    of each over an epoch becomes a column of metrics.csv: any entry added here becomes a metric,
    also on the dashboard and in the report.
    """
    figures: dict[str, Tensor] = {}
    weights: tuple[Tensor | None, ...] = (None,) * cfg.grad_accum
    if state.class_weights is not None:
        weights = relative_weights(labels, state.class_weights).chunk(cfg.grad_accum)
    parts = (images.chunk(cfg.grad_accum), labels.chunk(cfg.grad_accum), weights)
    for number, (inputs, targets, weight) in enumerate(zip(*parts, strict=True), start=1):
        last = number == cfg.grad_accum
        with nullcontext() if last else distributed.no_sync(state.wrapped_model):
            with state.autocast:
                logits = state.wrapped_model(inputs)
            loss = cross_entropy(logits.float(), targets, cfg.label_smoothing, weight)
            state.scaler.scale(loss / cfg.grad_accum).backward()  # gradients accumulate
        right = accuracy(logits.detach(), targets)
        for name, value in {"loss": loss.detach(), "top1": right}.items():
            figures[name] = figures.get(name, 0) + value / cfg.grad_accum
    figures = distributed.all_reduce_mean(figures)

    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    figures["grad_norm"] = grad_norm
    if cfg.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, cfg.grad_clip, grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        # If fp16 overflows in the very first step, the scaler skips the optimizer's step.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        state.schedule.step()
    if state.ema_model is not None:
        state.ema_model.update_parameters(state.model)
    return figures


def finish_epoch(cfg: DictConfig, state: RunState, progress: Progress, stop: Stop) -> Action:
    """Evaluate the model, or its EMA weights if there are any, and add the epoch's row.

    Returns the next action. An evaluation interrupted by a signal adds no row; a resumed run
    repeats it.

    Raises:
        FloatingPointError: if a number in the row is not finite.
    """
    trained, evaluating = progress.epoch_state, time.perf_counter()
    dataset, world = state.dataset, state.world
    model = state.model if state.ema_model is None else state.ema_model
    distributed.broadcast_buffers(model)
    if model is state.model and world.size == 1:
        model = state.wrapped_model  # with several processes, DDP would broadcast at each batch
    images = dataset.evaluation.shard(world.rank, world.size)
    batches = evaluation_batches(images, cfg.eval_batch_size, dataset.mean, dataset.std)
    scores, per_class_top1 = evaluate(model, stop.until_signalled(batches), state.autocast)
    if stop.any_signal():
        return Action.STOP
    steps = len(state.batches)
    row = {
        "epoch": len(progress.rows) + 1,
        **trained.training_metrics(),
        **{f"{dataset.evaluated_on}/{name}": value for name, value in scores.items()},
        **attention_entropy(state.evaluated_model, dataset),
        "perf/images_per_s": steps * cfg.batch_size / trained.seconds,
        "perf/peak_memory_mib": max(trained.peak_memory_mib, peak_memory_mib(state.device)),
        "perf/epoch_seconds": trained.seconds + time.perf_counter() - evaluating,
    }
    raise_if_nonfinite(row)
    progress.finish_epoch(row, per_class_top1, steps)
    if state.best_model is not None and best(progress.rows)["best/epoch"] == row["epoch"]:
        state.best_model.load_state_dict(state.evaluated_model.state_dict())
    return stop.after_epoch(last=len(progress.rows) == cfg.epochs)


def report_loss(progress: Progress, epoch_state: EpochState, steps: int, tracker: Tracker) -> None:
    """Send the loss since the last reading to the dashboard; the epoch's row has the last one."""
    newest = progress.read_loss(epoch_state, steps)
    if epoch_state.step < steps:
        for step, loss in newest.items():
            tracker.log({"step": step, STEP_LOSS: loss})


def report_epoch(
    cfg: DictConfig,
    state: RunState,
    progress: Progress,
    folder: run_folder.RunFolder | None,
    tracker: Tracker,
) -> None:
    """Write the finished epoch's row to metrics.csv, the dashboard and the log."""
    row = progress.rows[-1]
    if folder is not None:
        folder.write_metrics(progress.rows)
        newest = history(progress, len(state.batches))[-1]
        tracker.log(newest, pictures(cfg, state, progress, tracker))
    log.info("%s", epoch_line(row, cfg.epochs, state.dataset.evaluated_on))


def finish_run(
    cfg: DictConfig,
    config: dict[str, Any],
    state: RunState,
    progress: Progress,
    facts: dict[str, Any],
    folder: run_folder.RunFolder | None,
    tracker: Tracker,
) -> dict[str, Any]:
    """Return the finished run's summary; write it and the weights, and update the dashboard."""
    summary = summarize(config, progress, state.dataset, facts)
    if folder is not None:
        folder.write_weights(state.evaluated_model, state.description)
        if state.best_model is not None:
            folder.write_weights(state.best_model, state.description, run_folder.BEST)
        folder.write_summary(summary)
        tracker.summarize({k: v for k, v in summary.items() if "/" in k} | best(progress.rows))
        show(cfg, state, tracker, config, facts, folder.path)
    return summary
