"""Send a run to the dashboard: its settings and facts, its history, and its pictures."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from training import media, sweep
from training.assemble import RunState
from training.progress import Progress
from training.provenance import uncommitted
from training.run_folder import DESCRIPTION, LOG, WEIGHTS
from training.tracking import STEP_LOSS, Tracker, agent_parameters, dashboard_config, track
from training.variants import run_name


@contextmanager
def start_tracking(
    cfg: DictConfig,
    config: dict[str, Any],
    run_dir: Path,
    facts: dict[str, Any],
    progress: Progress,
    state: RunState,
) -> Iterator[Tracker]:
    """Start the run on the dashboard, or continue it if it is already there.

    wandb's environment variables give the name and the job type, and the tags if the settings have
    none. Uploaded with the run are all settings and facts as settings.json, train.log and, unless
    WANDB_DISABLE_CODE is set, the uncommitted changes to the code.
    """
    tags = cfg.wandb.tags or filter(None, map(str.strip, _environment("TAGS").split(",")))
    words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    given = [word.lstrip("+").partition("=")[0] for word in words]
    segment = {k: v for k, v in progress.segments[-1].items() if k != "first_epoch"}
    with track(
        config["wandb"]["mode"] if state.world.is_main else "disabled",
        folder=Path(os.path.expanduser(cfg.out_dir)),
        project=cfg.wandb.project,
        entity=cfg.wandb.entity,
        group=cfg.wandb.group,
        name=_environment("NAME") or name_of_run(cfg, facts, words),
        job_type=_environment("JOB_TYPE") or "train",
        tags=[facts["model"], facts["attention"], facts["data"], *tags],
        notes=cfg.wandb.notes,
        config=dashboard_config(config, facts, segment, given),
        run_id=progress.wandb_id,
        rows=history(progress, len(state.batches)),
    ) as tracker:
        whole = {"settings": config, **facts, "env": segment}
        tracker.keep("settings.json", json.dumps(whole, indent=2).encode())
        diff = b"" if not tracker.active or _environment("DISABLE_CODE") else uncommitted()
        if diff:
            tracker.keep("uncommitted.diff", diff)
        try:
            yield tracker
        finally:
            if tracker.active and (run_dir / LOG).is_file():
                tracker.keep(LOG, (run_dir / LOG).read_bytes())


def history(progress: Progress, steps: int) -> list[dict[str, Any]]:
    """Return the dashboard's rows of a run, in order; an epoch has ``steps`` steps.

    There is a row for each reading of the loss and for each epoch. An epoch's row has the best
    accuracy so far on held-out images, never on the test set, which must not choose an epoch.
    """
    losses = progress.step_losses(steps)
    rows: dict[int, dict[str, Any]] = {s: {STEP_LOSS: loss} for s, loss in losses.items()}
    best = 0.0
    for number, row in enumerate(progress.rows, start=1):
        rows[number * steps] = rows.get(number * steps, {}) | row
        if "val/top1" in row:
            best = max(best, row["val/top1"])
            rows[number * steps]["best/val_top1"] = best
    return [rows[step] | {"step": step} for step in sorted(rows)]


def _environment(name: str) -> str:
    return os.environ.get(f"WANDB_{name}", "")


def name_of_run(cfg: DictConfig, facts: dict[str, Any], words: list[str]) -> str:
    """See `training.variants.run_name`; an agent's sweep varies only the settings it searches."""
    fixed, searched = sweep.fixed_settings(), agent_parameters()
    if searched is not None:
        fixed = {word.partition("=")[0] for word in words} - searched
    return run_name(words, facts["attention"], cfg.seed, group=cfg.wandb.group, fixed=fixed)


def pictures(
    cfg: DictConfig, state: RunState, progress: Progress, tracker: Tracker
) -> dict[str, Any]:
    """Draw the attention after the finished epoch; empty unless the dashboard needs it now."""
    shown = tracker.active and cfg.tracking.media
    if not shown or len(progress.rows) not in media.media_epochs(cfg.epochs):
        return {}
    return media.attention_pictures(state.evaluated_model, state.dataset)


def show(
    cfg: DictConfig,
    state: RunState,
    tracker: Tracker,
    config: dict[str, Any],
    facts: dict[str, Any],
    folder: Path,
) -> None:
    """Send the finished run's pictures and tables to the dashboard, and its weights if set."""
    if not tracker.active:
        return
    model = state.evaluated_model
    if cfg.tracking.media:
        tracker.show(media.final_media(model, state.dataset, cfg.eval_batch_size, state.autocast))
    if cfg.tracking.weights:
        files = [folder / name for name in (WEIGHTS, DESCRIPTION)]
        name = f"{facts['model']}-{facts['attention']}-{tracker.id}"
        tracker.artifact(name, "model", files, {"config": config, **facts})
