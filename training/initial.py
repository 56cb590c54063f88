"""Initialize a network with the weights of another run or a published network: ``init_from``."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from torch import nn

from data import Dataset
from models import ForeignWeights, Trained, transfer
from models.saved import load_weights, tensors_as_bytes

log = logging.getLogger(__name__)

TAKEN = (
    "init_from takes a run's folder, its weights.safetensors or last.pt, and the state dict of a "
    "ResNet of torchvision or timm (.pth, .pt, .safetensors)"
)


def load_initial(cfg: DictConfig) -> Trained | ForeignWeights | None:
    """Load the weights that ``init_from`` names; return None if it is null.

    Raises:
        ValueError: if the weights are missing or cannot be read.
    """
    path = cfg.init_from
    if path is None:
        if cfg.freeze:
            _warn_of_frozen(cfg.freeze, "without init_from")
        return None
    try:
        return load_weights(path)
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}; {TAKEN}") from error


def take_weights(
    model: nn.Module,
    initial: Trained | ForeignWeights,
    dataset: Dataset,
    path: str,
    frozen: Sequence[str],
) -> None:
    """Copy the weights of ``initial`` that fit into ``model``, and log those that do not.

    Raises:
        ValueError: if nothing fits.
    """
    try:
        done = transfer(model, initial, dataset.class_names)
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}") from error
    log.info("init_from=%s: %s of %s parameters taken", path, f"{done.taken:,}", f"{done.of:,}")
    for line in done.table():
        log.info(line)
    new = [f"{row.module}." for row in done.rows if row.why.startswith("newly")]
    still_random = [name for name in frozen if any(one.startswith(f"{name}.") for one in new)]
    if still_random:
        _warn_of_frozen(still_random, "with parts that are newly initialized")


def _warn_of_frozen(names: Sequence[str], why: str) -> None:
    log.warning("freeze=[%s] %s: random weights there stay untrained", ",".join(names), why)


def init_provenance(initial: Trained | ForeignWeights | None) -> dict[str, Any]:
    """Return the summary's entry on the initial weights of a run; empty if they were random."""
    if initial is None:
        return {}
    if isinstance(initial, ForeignWeights):
        origin, tensors = {"data": "unknown", "commit": "unknown"}, initial.tensors
    else:
        origin = initial.description.model_dump(include={"data", "data_digest", "commit"})
        tensors = initial.network.state_dict()
    weights = hashlib.blake2b(tensors_as_bytes(tensors), digest_size=8).hexdigest()
    return {"init_from": {**origin, "weights": weights}}
