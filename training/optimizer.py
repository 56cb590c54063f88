"""The optimizer of a run, with weight decay and learning rate by parameter group."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from aaconv.maps import augmented_layers
from training.compose import make

# `_NormBase` is the base class of all batch and instance norms in torch, also of SyncBatchNorm.
NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def make_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of the config group `optim` for the trainable parameters of ``model``.

    Raises:
        ValueError: see `parameter_groups`.
    """
    settings = {key: value for key, value in cfg.items() if key not in ("decay", "lr_factors")}
    groups = parameter_groups(model, cfg)
    made: torch.optim.Optimizer = make(settings)(groups)
    return made


def parameter_groups(model: nn.Module, cfg: DictConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups; the first has the base learning rate.

    With ``cfg.decay`` "weights", there is no weight decay on parameters of at most one dimension
    (biases and normalization scales) or on those a module names in ``no_weight_decay()``, such as
    the relative tables of `aaconv.AugmentedConv`. Each of ``cfg.lr_factors`` other than 1 makes one
    or two groups for the parameters of its kind, see `kinds_of`.

    Raises:
        ValueError: if a factor other than 1 is of a kind without trainable parameters.
    """
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    kinds, by_weights = kinds_of(model), cfg.decay.name == "weights"
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): []}
    if by_weights:
        groups[1.0, False] = []
    unused = {kind for kind, factor in cfg.lr_factors.items() if factor != 1}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, decayed = kinds.get(name), parameter.dim() >= 2 and name not in spared
            unused.discard(kind)
            factor = 1.0 if kind is None else cfg.lr_factors[kind]
            groups.setdefault((factor, decayed or not by_weights), []).append(parameter)
    for kind in sorted(unused):
        raise ValueError(
            f"optim.lr_factors.{kind}={cfg.lr_factors[kind]}: the network trains no parameter of "
            "that kind; leave it at 1"
        )
    return [
        {"params": parameters}
        | ({} if factor == 1 else {"lr": factor * cfg.lr})
        | ({} if decayed else {"weight_decay": 0.0})
        for (factor, decayed), parameters in groups.items()
    ]


def kinds_of(model: nn.Module) -> Mapping[str, str]:
    """Return the kind in ``optim.lr_factors`` of each parameter that has one, by parameter name.

    ``norm_bias``: the biases of normalization layers; ``attention``: all parameters of augmented
    convolutions except ``conv_out``, their plain convolution; ``head``: the last layer.
    """
    kinds = {
        f"{prefix}.bias": "norm_bias"
        for prefix, module in model.named_modules()
        if isinstance(module, NORMALIZATIONS)
    }
    for prefix, layer in augmented_layers(model).items():
        own = (name for name, _ in layer.named_parameters() if not name.startswith("conv_out."))
        kinds |= {f"{prefix}.{name}": "attention" for name in own}
    return kinds | {"head.weight": "head", "head.bias": "head"}
