"""From the resolved settings to what they name; what cannot work is refused by name."""

import math
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from models import ResNet


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """All settings as plain values: interpolations followed, enums by their name."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check(cfg: DictConfig, processes: int = 1) -> None:
    """Raise ValueError for numbers that no run can have, before anything is read or built."""
    for name in ("epochs", "batch_size", "grad_accum", "eval_batch_size", "log_every"):
        if cfg[name] < 1:
            raise ValueError(f"{name}={cfg[name]} must be at least 1")
    if cfg.batch_size % (cfg.grad_accum * processes):
        parts = f"grad_accum={cfg.grad_accum}"
        if processes > 1:
            parts += f" times {processes} processes"
        raise ValueError(f"batch_size={cfg.batch_size} must be divisible by {parts}")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed={cfg.seed} must be at least 0 and less than 2^32")
    if not 0 <= cfg.label_smoothing < 1:
        raise ValueError(f"label_smoothing={cfg.label_smoothing} must be in [0, 1)")
    if cfg.grad_clip is not None and not cfg.grad_clip > 0:
        raise ValueError(f"grad_clip={cfg.grad_clip} must be positive, or null for none")
    if cfg.ema is not None and not 0 < cfg.ema < 1:
        raise ValueError(f"ema={cfg.ema} must lie between 0 and 1, or be null for none")
    for name in ("checkpoint_minutes", "max_minutes"):
        if cfg[name] is not None and not cfg[name] > 0:
            raise ValueError(f"{name}={cfg[name]} must be positive, or null for none")
    if not 0 < cfg.optim.lr < math.inf:
        raise ValueError(f"optim.lr={cfg.optim.lr} must be positive")
    if not 0 <= cfg.optim.weight_decay < math.inf:
        raise ValueError(f"optim.weight_decay={cfg.optim.weight_decay} must not be negative")


def build_model(cfg: DictConfig, *, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """The network of ``cfg.model`` with the attention of ``cfg.attention``, for such images.

    Raises:
        ValueError: see `models.ResNet`.
    """
    return ResNet(
        block=cfg.model.block,
        depths=list(cfg.model.depths),
        widths=list(cfg.model.widths),
        stem=cfg.model.stem,
        shortcut=cfg.model.shortcut.name,
        num_classes=num_classes,
        image_size=image_size,
        attention=instantiate(cfg.attention, _convert_="all"),
    )
