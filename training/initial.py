"""Weights of another run to begin with: ``init_from``."""

import hashlib
import logging
from typing import Any

from torch import nn

from data import Dataset
from models import Trained, load, transfer
from models.saved import weights_as_bytes

log = logging.getLogger(__name__)


def load_initial(path: str) -> Trained:
    """The network that ``init_from`` names.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        return load(path)
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}") from error


def take_weights(model: nn.Module, initial: Trained, dataset: Dataset, path: str) -> None:
    """Give ``model`` what fits of ``initial``, and log what does not.

    Raises:
        ValueError: nothing fits.
    """
    try:
        done = transfer(model, initial, dataset.class_names)
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}") from error
    log.info("init_from=%s: %s of %s parameters taken", path, f"{done.taken:,}", f"{done.of:,}")
    for line in done.table():
        log.info(line)


def init_provenance(initial: Trained | None) -> dict[str, Any]:
    """What a summary says of the weights that a run began with; nothing for new ones."""
    if initial is None:
        return {}
    description = initial.description
    weights = hashlib.blake2b(weights_as_bytes(initial.network), digest_size=8).hexdigest()
    return {
        "init_from": {
            "data": description.data,
            "data_digest": description.data_digest,
            "commit": description.commit,
            "weights": weights,
        }
    }
