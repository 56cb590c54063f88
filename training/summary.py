"""Describe what a run trains and summarize its results, for its files, dashboard and log."""

import logging
import math
from typing import Any

from omegaconf import DictConfig

from data import Dataset
from models import count_flops, count_parameters, layer_facts, layer_table
from models.fields import FORMAT
from training import provenance
from training.assemble import RunState
from training.device import dtype_name
from training.progress import Progress
from training.records import nonfinite

log = logging.getLogger(__name__)

# The size of the largest maps that the paper attends to; larger ones cause a warning.
MAX_POSITIONS = 32 * 32


def describe_training(cfg: DictConfig, state: RunState) -> dict[str, Any]:
    """Log and return what will be trained, for the summary and the dashboard."""
    facts = {
        "model": cfg.model.name,
        "attention": state.description.network["attention"]["name"],
        "data": state.dataset.name,
        "data_digest": state.dataset.digest,
        "evaluated_on": state.dataset.evaluated_on,
        "parameters": count_parameters(state.model),
        "flops": count_flops(state.model, state.dataset.image_size),
        "layers": layer_facts(state.model),
        "precision": dtype_name(state.dtype),
    }
    log.info(
        "%s (attention: %s) on %s: %s parameters, %.4g GFLOPs per image, %s on %s",
        facts["model"],
        facts["attention"],
        facts["data"],
        f"{facts['parameters']:,}",
        facts["flops"] / 1e9,
        facts["precision"],
        provenance.hardware(state.device),
    )
    for line in layer_table(facts["layers"]):
        log.info(line)
    height, width = max(
        ((layer["height"], layer["width"]) for layer in facts["layers"]),
        key=math.prod,
        default=(0, 0),
    )
    if height * width > MAX_POSITIONS:
        log.warning(
            "attention on maps of %dx%d costs most of these FLOPs; attention.stages=[...] without "
            "the first ones, or a model for such images (model=resnet50_224), costs less",
            height,
            width,
        )
    return facts


def summarize(
    config: dict[str, Any], progress: Progress, dataset: Dataset, facts: dict[str, Any]
) -> dict[str, Any]:
    """Return the `training.records.Summary` of a finished run."""
    last = progress.rows[-1]
    return {
        "format": FORMAT,
        "epochs": len(progress.rows),
        "seed": config["seed"],
        **{key: last[key] for key in last if "/" in key and not key.startswith("perf/")},
        **(best(progress.rows) if config["keep_best"] else {}),
        "perf/total_seconds": sum(row["perf/epoch_seconds"] for row in progress.rows),
        "per_class_top1": progress.per_class_top1,
        "class_names": list(dataset.class_names),
        **{key: facts[key] for key in facts if key != "precision"},
        "notes": list(dataset.notes),
        "segments": progress.segments,
        "config": config,
    }


def best(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the best accuracy on held-out images and its epoch, the first one in case of a tie.

    Empty without held-out images: the test set must not choose an epoch.
    """
    if "val/top1" not in rows[-1]:
        return {}
    row = max(rows, key=lambda row: row["val/top1"])
    return {"best/val_top1": row["val/top1"], "best/epoch": row["epoch"]}


def raise_if_nonfinite(row: dict[str, Any]) -> None:
    """Raise FloatingPointError if a number in the epoch's row is not finite."""
    fault = nonfinite(row)
    if fault is not None:
        raise FloatingPointError(
            f"{fault} after epoch {row['epoch']}; a lower optim.lr or grad_clip may help"
        )


def epoch_line(row: dict[str, Any], epochs: int, on: str) -> str:
    """Return an epoch's metrics as a line for the log."""
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train/loss']:.4f}, {on} top-1 "
        f"{row[f'{on}/top1']:.2f}, top-5 {row[f'{on}/top5']:.2f}, lr {row['train/lr']:.3g}, "
        f"{row['perf/images_per_s']:.0f} images/s"
    )
