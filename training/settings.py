"""Resolve and check settings, and build the network; errors name the setting at fault."""

import dataclasses
import math
from typing import Any, get_args

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

import models
from configs.schema import CifarConfig, FolderConfig, LookupConfig, unknown_setting
from configs.setting import MAX_FLOAT
from data.batches import check_batch_size
from data.cifar import TRAIN_SIZE, check_name
from data.dataset import check_val_size
from data.folder import height_and_width
from models.fields import is_number
from training.compose import make
from training.loss import BALANCED
from training.optimizer import parameter_groups

MAX_BLOCKS = 1000
MAX_PARAMETERS = 10**10


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Return all settings as plain values, with interpolations resolved and enums by name."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    return plain


def check(cfg: DictConfig, world_size: int = 1) -> None:
    """Raise ValueError for settings that no run can have, before any data is read.

    What depends on the data, such as a batch larger than a folder of images, is only found when the
    data is read.
    """
    _check_class_weights(OmegaConf.select(cfg, "class_weights"))
    check_fields(cfg)
    if cfg.batch_size % (cfg.grad_accum * world_size):
        parts = f"grad_accum={cfg.grad_accum}"
        if world_size > 1:
            parts += f" times {world_size} processes"
        raise ValueError(f"batch_size={cfg.batch_size} must be divisible by {parts}")
    for name in ("name", "out_dir", "run_dir"):
        if cfg[name] == "":
            raise ValueError(f"{name}= must not be empty: it names a folder")
    if cfg.model.name == "":
        raise ValueError("model.name= must not be empty: results are listed by it")
    _check_project(cfg.wandb.project, cfg.wandb.mode.name)
    if "momentum" in cfg.optim and cfg.optim.nesterov and not cfg.optim.momentum:
        raise ValueError("optim.nesterov=true needs an optim.momentum above 0")
    _check_data(cfg)
    _check_network(cfg)


def check_fields(node: DictConfig, where: str = "") -> None:
    """Raise ValueError unless all settings of an option are known, present and within range."""
    # Hydra accepts `+key=value`, which nothing would read, and `~key`. `_target_`, a class, is
    # fixed by the option of the group.
    kind: Any = OmegaConf.get_type(node)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in map(str, node):
        if key not in known:
            raise ValueError(unknown_setting(where, key, kind))
    for key, field in known.items():
        # A mandatory setting without a value is not in node either; reading it below reports that.
        if key not in node and not OmegaConf.is_missing(node, key):
            raise ValueError(f"{where}{key} cannot be removed; leave out ~{where}{key}")
        value = node[key]
        if key[0] == "_" and value != field.default:
            raise ValueError(
                f"{where}{key}={value} cannot be set; choose another option of the group "
                f"{where.rstrip('.')}"
            )
        if isinstance(value, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(value)):
            check_fields(value, f"{where}{key}.")
        elif "range" in field.metadata and not field.metadata["range"].allows(value):
            words = field.metadata["range"].words()
            if isinstance(value, float) and not math.isfinite(value):
                words = f"finite and {words}"
            elif isinstance(value, float) and value > MAX_FLOAT and "at most" not in words:
                words += f" and at most {MAX_FLOAT:g}"
            if type(None) in get_args(field.type):
                words += ", or null"
            raise ValueError(f"{where}{key}={value} must be {words}")


def _check_class_weights(value: Any) -> None:
    numbers = isinstance(value, ListConfig) and all(map(is_number, value))
    if not (value is None or value == BALANCED or numbers):
        raise ValueError(
            f"class_weights={value} must be null, {BALANCED}, or a list with one number per class"
        )


def _check_data(cfg: DictConfig) -> None:
    """Check what is known without reading any images; a folder's number of images is not."""
    data, augmentation = cfg.data, make(cfg.augmentation)
    if OmegaConf.select(data, "root") == "":
        raise ValueError("data.root= must not be empty: it names a folder")
    if data["_target_"] == FolderConfig._target_:
        augmentation.check_fits(*height_and_width(resolve(cfg)["data"]["size"]))
        return
    if data["_target_"] not in (CifarConfig._target_, LookupConfig._target_):
        return  # a data set made in code is checked once it is made
    augmentation.check_fits(32, 32)
    number = data.get("train_size") or TRAIN_SIZE
    check_val_size(data.val_size, number)
    check_batch_size(cfg.batch_size, number - data.val_size)
    if data["_target_"] == CifarConfig._target_:
        check_name(data.name)


def _check_project(project: str, mode: str) -> None:
    if mode != "disabled" and (not project or set(project) & set("/\\#?%:")):
        raise ValueError(
            f"wandb.project={project} must be a name without / \\ # ? % :, "
            "or wandb.mode be disabled"
        )


def _check_network(cfg: DictConfig) -> None:
    attention = cfg.attention
    if sum(cfg.model.depths) > MAX_BLOCKS:
        raise ValueError(
            f"model.depths={list(cfg.model.depths)} must not be more than {MAX_BLOCKS} blocks"
        )
    try:
        # On the meta device, to use no memory; classes and image size matter little to the count.
        with torch.device("meta"):
            network = build_model(cfg, num_classes=10, image_size=(32, 32))
        parameters: float = sum(p.numel() for p in network.parameters())
    except (RuntimeError, OverflowError, TypeError):
        parameters = math.inf  # torch counts to 2^63
    else:
        models.freeze(network, cfg.freeze)
        parameter_groups(network, cfg.optim)
    if parameters > MAX_PARAMETERS:
        sizes = [f"model.{key}={cfg.model[key]}" for key in ("depths", "widths", "stem")]
        sizes += [
            f"attention.{key}={attention[key]}" for key in ("dk", "min_dkh") if key in attention
        ]
        raise ValueError(
            f"the network would have more than {MAX_PARAMETERS:.0e} parameters; "
            f"make one of {', '.join(sizes)} smaller"
        )


def build_model(cfg: DictConfig, *, num_classes: int, image_size: tuple[int, int]) -> models.ResNet:
    """Build the network of ``cfg.model`` with the attention of ``cfg.attention``.

    Raises:
        ValueError: see `models.ResNet`.
    """
    arguments = {key: value for key, value in cfg.model.items() if key not in ("name", "aa")}
    network: models.ResNet = make(arguments)(
        num_classes=num_classes,
        image_size=image_size,
        attention=make(cfg.attention),
    )
    return network
