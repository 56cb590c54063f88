"""What the dashboard gets of a run: its beginning, and what there is to see of it."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from training.progress import Progress
from training.run_folder import DESCRIPTION, WEIGHTS
from training.state import RunState
from training.tracking import Tracker, dashboard_config, track
from training.world import World


def start_tracking(
    cfg: DictConfig,
    config: dict[str, Any],
    run_dir: Path,
    facts: dict[str, Any],
    progress: Progress,
    world: World,
) -> Any:
    """The context manager of the run on the dashboard, which continues if it was there before."""
    provenance = {k: v for k, v in progress.segments[-1].items() if k != "first_epoch"}
    return track(
        config["wandb"]["mode"] if world.is_main else "disabled",
        folder=Path(cfg.out_dir),
        project=cfg.wandb.project,
        entity=cfg.wandb.entity,
        group=cfg.wandb.group,
        name=f"{run_dir.parent.name} {run_dir.name}",
        job_type="train",
        tags=[facts["model"], facts["attention"], facts["data"]],
        config=dashboard_config(config, facts, provenance),
        run_id=progress.wandb_id,
        rows=progress.rows,
    )


def pictures(
    cfg: DictConfig, state: RunState, progress: Progress, tracker: Tracker
) -> dict[str, Any]:
    """Attention after the epoch that is finished, where the dashboard is to have it."""
    if not (tracker.active and cfg.tracking.media):
        return {}
    from training import media  # which needs Pillow

    if len(progress.rows) not in media.media_epochs(cfg.epochs):
        return {}
    return {**media.attention_pictures(state.evaluated_model, state.dataset)}


def show(
    cfg: DictConfig,
    state: RunState,
    tracker: Tracker,
    config: dict[str, Any],
    facts: dict[str, Any],
    folder: Path,
) -> None:
    """Give the dashboard what there is to see of the finished run, and the weights if asked to."""
    if not tracker.active:
        return
    model = state.evaluated_model
    if cfg.tracking.media:
        from training import media  # which needs Pillow

        tracker.show(media.final_media(model, state.dataset, cfg.eval_batch_size, state.autocast))
    if cfg.tracking.weights:
        files = [folder / name for name in (WEIGHTS, DESCRIPTION)]
        name = f"{facts['model']}-{facts['attention']}-{tracker.id}"
        tracker.artifact(name, "model", files, {"config": config, **facts})
