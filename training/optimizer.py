"""The optimizer of a run, and which of its parameters are decayed."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn


def make_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the group `optim` for those parameters of ``model`` that are trained."""
    settings = {key: value for key, value in cfg.items() if key != "decay"}
    groups: Any = parameter_groups(model)
    if cfg.decay.name == "all":
        groups = [p for p in model.parameters() if p.requires_grad]
    made: torch.optim.Optimizer = instantiate(settings, _convert_="all")(groups)
    return made


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that are decayed, and those that are not, as groups of an optimizer.

    Not decayed are those of at most one dimension, which are biases and the scales of
    normalization, and what a module names in ``no_weight_decay()``: an `aaconv.AugmentedConv` its
    relative tables.
    """
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.dim() < 2 or name in spared else decayed).append(parameter)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
