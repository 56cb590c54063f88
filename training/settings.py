"""From the resolved settings to what they name; what cannot work is refused by name."""

import dataclasses
import math
from typing import Any, Optional

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import models
from configs.schema import OPTIONS, Config

# More is a slip of the keyboard, and would end in a run without end or in a lack of memory.
MOST = {
    "epochs": 1_000_000,
    "batch_size": 2**31 - 1,
    "grad_accum": 2**31 - 1,
    "eval_batch_size": 2**31 - 1,
    "log_every": 2**31 - 1,
    "data.train_size": 1_000_000,
    "data.test_size": 1_000_000,
}
MOST_BLOCKS = 1000
MOST_PARAMETERS = 10**10


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """All settings as plain values: interpolations followed, enums by their name."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check(cfg: DictConfig, world_size: int = 1) -> None:
    """Raise ValueError for what no run can have, before anything is read or built.

    What only the data can tell, such as a batch larger than the set, is found when they are read.
    """
    _check_keys(cfg)
    for name, most in MOST.items():
        value = OmegaConf.select(cfg, name)
        if value is not None and not 1 <= value <= most:
            bound = f"at least 1 and at most {most}" if value > most else "at least 1"
            raise ValueError(f"{name}={value} must be {bound}")
    if cfg.batch_size % (cfg.grad_accum * world_size):
        parts = f"grad_accum={cfg.grad_accum}"
        if world_size > 1:
            parts += f" times {world_size} processes"
        raise ValueError(f"batch_size={cfg.batch_size} must be divisible by {parts}")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed={cfg.seed} must be at least 0 and less than 2^32")
    if not 0 <= cfg.label_smoothing < 1:
        raise ValueError(f"label_smoothing={cfg.label_smoothing} must be in [0, 1)")
    if cfg.grad_clip is not None and not 0 < cfg.grad_clip < math.inf:
        raise ValueError(f"grad_clip={cfg.grad_clip} must be positive and finite, or null for none")
    if cfg.ema is not None and not 0 < cfg.ema < 1:
        raise ValueError(f"ema={cfg.ema} must lie between 0 and 1, or be null for none")
    for name in ("checkpoint_minutes", "max_minutes"):
        if cfg[name] is not None and not cfg[name] > 0:
            raise ValueError(f"{name}={cfg[name]} must be positive, or null for none")
    for name in ("name", "out_dir"):
        if not cfg[name]:
            raise ValueError(f"{name}= must not be empty: it names a folder")
    _check_project(cfg.wandb.project, cfg.wandb.mode.name)
    _check_optimizer(cfg)
    _check_network(cfg)


def _check_keys(node: DictConfig, where: str = "") -> None:
    # Hydra lets `+key=value` through, which nothing would read, and `~key`; `_target_` is a class
    # and belongs to the option of a group.
    kind = OmegaConf.get_type(node)
    if dataclasses.is_dataclass(kind):
        known = {f.name: f for f in dataclasses.fields(kind)}
        for key in map(str, node):
            if key not in known:
                raise ValueError(unknown_setting(where, key, kind))
        for name, field in known.items():
            if name not in node:
                raise ValueError(f"{where}{name} has been taken away; leave out ~{where}{name}")
            if name[0] == "_" and node[name] != field.default:
                raise ValueError(
                    f"{where}{name}={node[name]} cannot be set; choose another option of the group "
                    f"{where.rstrip('.')}"
                )
    for inner, value in node.items():
        if isinstance(value, DictConfig):
            _check_keys(value, f"{where}{inner!s}.")


def unknown_setting(where: str, key: str, kind: Any) -> str:
    """One line on a key that the config type ``kind``, found at ``where``, does not have."""
    known = [f.name for f in dataclasses.fields(kind) if f.name[0] != "_"]
    there = f"{_with_option(where.rstrip('.'), kind)} has" if where else "there are"
    return f"{where}{key}: unknown setting {key}; {there} {', '.join(known) or 'no settings'}"


def _with_option(group: str, kind: Any) -> str:
    """``attention=none`` where ``kind`` belongs to that option alone, else ``group``."""
    options = [name for there, name, k in OPTIONS if (there, k) == (group, kind)]
    return f"{group}={options[0]}" if options and group != "data" else group


def is_text(key: str) -> bool:
    """Whether the setting of this dotted name is any text, or a path; hydra's own count as such."""
    if key.startswith("hydra."):
        return True
    kinds: list[Any] = [Config]
    *groups, name = key.split(".")
    for group in groups:
        fields = {f.name: f for kind in kinds for f in dataclasses.fields(kind)}
        if group not in fields:
            return False
        own = fields[group].type
        of_options = [kind for there, _, kind in OPTIONS if there == group]
        kinds = [own] if dataclasses.is_dataclass(own) else of_options
    return any(
        f.name == name and f.type in (str, Optional[str])  # noqa: UP045 (as the schema writes it)
        for kind in kinds
        for f in dataclasses.fields(kind)
    )


def _check_project(project: str, mode: str) -> None:
    if mode != "disabled" and (not project or set(project) & set("/\\#?%:")):
        raise ValueError(
            f"wandb.project={project} must be a name without / \\ # ? % :, "
            "or wandb.mode be disabled"
        )


def _check_optimizer(cfg: DictConfig) -> None:
    optim = cfg.optim
    if not 0 < optim.lr < math.inf:
        raise ValueError(f"optim.lr={optim.lr} must be positive and finite")
    if not 0 <= optim.weight_decay < math.inf:
        raise ValueError(f"optim.weight_decay={optim.weight_decay} must be finite, at least 0")
    if "betas" in optim and not (len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas)):
        raise ValueError(f"optim.betas={list(optim.betas)} must be two numbers in [0, 1)")
    if "momentum" in optim:
        if not 0 <= optim.momentum < 1:
            raise ValueError(f"optim.momentum={optim.momentum} must be in [0, 1)")
        if optim.nesterov and not optim.momentum:
            raise ValueError("optim.nesterov=true needs an optim.momentum above 0")


def _check_network(cfg: DictConfig) -> None:
    attention = cfg.attention
    if OmegaConf.select(attention, "dv") == 0:
        raise ValueError("attention.dv=0 leaves nothing of the attention; use attention=none")
    if sum(cfg.model.depths) > MOST_BLOCKS:
        raise ValueError(
            f"model.depths={list(cfg.model.depths)} must not be more than {MOST_BLOCKS} blocks"
        )
    try:
        # Without memory; the number of classes and the images' size change little of it.
        with torch.device("meta"):
            network = build_model(cfg, num_classes=10, image_size=(32, 32))
        parameters: float = sum(p.numel() for p in network.parameters())
    except (RuntimeError, OverflowError, TypeError):
        parameters = math.inf  # torch counts to 2^63
    else:
        models.freeze(network, cfg.freeze)
    if parameters > MOST_PARAMETERS:
        sizes = [f"model.{key}={cfg.model[key]}" for key in ("depths", "widths", "stem")]
        sizes += [
            f"attention.{key}={attention[key]}" for key in ("dk", "min_dkh") if key in attention
        ]
        raise ValueError(
            f"the network would have more than {MOST_PARAMETERS:.0e} parameters; "
            f"make one of {', '.join(sizes)} smaller"
        )


def build_model(cfg: DictConfig, *, num_classes: int, image_size: tuple[int, int]) -> models.ResNet:
    """The network of ``cfg.model`` with the attention of ``cfg.attention``, for such images.

    Raises:
        ValueError: see `models.ResNet`.
    """
    arguments = {key: value for key, value in cfg.model.items() if key not in ("name", "aa")}
    network: models.ResNet = instantiate(arguments, _convert_="all")(
        num_classes=num_classes,
        image_size=image_size,
        attention=instantiate(cfg.attention, _convert_="all"),
    )
    return network
