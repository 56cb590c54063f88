"""The optimizer of a run: which parameters are decayed, and which have a rate of their own."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from aaconv.maps import augmented_layers
from training.compose import make

# Their bases are the common ones of all kinds that torch has, synchronized ones too.
NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def make_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the group `optim` for those parameters of ``model`` that are trained.

    Raises:
        ValueError: see `parameter_groups`.
    """
    settings = {key: value for key, value in cfg.items() if key not in ("decay", "lr_factors")}
    groups = parameter_groups(model, cfg)
    made: torch.optim.Optimizer = make(settings)(groups)
    return made


def parameter_groups(model: nn.Module, cfg: DictConfig) -> list[dict[str, Any]]:
    """The parameters that are trained, as groups of an optimizer; the first has the plain rate.

    With ``cfg.decay`` "weights" those of at most one dimension are not decayed, which are biases
    and the scales of normalization, and what a module names in ``no_weight_decay()``: an
    `aaconv.AugmentedConv` its relative tables. Each of ``cfg.lr_factors`` other than 1 makes a
    group, or two, of the parameters of its kind, see `kinds_of`.

    Raises:
        ValueError: a factor is of a kind that no parameter which is trained is of.
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
    """The kind in ``optim.lr_factors`` of each parameter that has one, by the parameter's name.

    ``norm_bias`` are the biases of normalization; ``attention`` is what augmented convolutions have
    beside the plain one; ``head`` is the last layer.
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
