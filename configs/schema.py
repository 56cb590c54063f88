"""Types of all settings. A key or a type that is not here stops `train.py` at its start.

The comments say what a setting means; its value stands in the YAML file beside, so that there
is one place to read it and one to change it.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

# They name, place, speed up or report a run, and change nothing of its result: Hydra names no
# folder by them, a checkpoint may be continued with others, and compare.py hands them to every run.
NO_EFFECT_ON_RESULT = (
    "name",
    "out_dir",
    "resume",
    "overwrite",
    "device",
    "eval_batch_size",
    "log_every",
    "checkpoint_minutes",
    "max_minutes",
    "wandb.mode",
    "wandb.project",
    "wandb.entity",
    "wandb.group",
    "data.root",
    "data.download",
)

# OmegaConf reads these annotations at run time and knows `Union` and `Optional`, not `X | Y`.
# ruff: noqa: UP007, UP045


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ShortcutKind(Enum):
    projection = "projection"
    pad = "pad"
    subsample = "subsample"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class AugmentConfig:
    """The attention that a network takes with attention=aa unless told otherwise."""

    dk: Union[int, float] = MISSING
    dv: Union[int, float] = MISSING
    Nh: int = MISSING
    min_dkh: int = MISSING
    stages: list[int] = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    block: str = MISSING  # basic, bottleneck or preact
    depths: list[int] = MISSING  # blocks of each stage
    widths: list[int] = MISSING  # channels of each stage
    stem: int = MISSING  # channels of the first convolution
    shortcut: ShortcutKind = MISSING
    aa: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class NoAttentionConfig:
    _target_: str = "models.NoAttention"


@dataclass
class AugmentedConvConfig:
    _target_: str = "models.AA"
    dk: Union[int, float] = MISSING  # channels (20) or a fraction of the block's output (0.2)
    dv: Union[int, float] = MISSING
    Nh: int = MISSING
    min_dkh: int = MISSING  # least key channels per head where dk is a fraction
    position: str = MISSING  # relative, none, sine or coord
    stages: list[int] = MISSING
    backend: str = MISSING  # auto, reference, sdpa, tiled, fused or flex: see aaconv.attention_2d


@dataclass
class SqueezeExciteConfig:
    _target_: str = "models.SE"
    ratio: int = MISSING


@dataclass
class GatherExciteConfig:
    _target_: str = "models.GE"


@dataclass
class Cifar:
    _target_: str = "data.load_cifar"
    name: str = MISSING
    root: str = MISSING  # folder that holds, or gets, torchvision's files
    download: bool = MISSING
    val_size: int = MISSING  # training images held out and evaluated instead of the test set
    crop_pad: int = MISSING
    flip: bool = MISSING
    cutout: int = MISSING  # side in pixels, 0 for none


@dataclass
class Lookup:
    _target_: str = "data.make_lookup"
    train_size: int = MISSING
    test_size: int = MISSING
    noise: float = MISSING
    data_seed: int = MISSING
    val_size: int = MISSING
    crop_pad: int = MISSING
    flip: bool = MISSING
    cutout: int = MISSING


@dataclass
class SGD:
    _target_: str = "torch.optim.SGD"
    _partial_: bool = True
    lr: float = MISSING  # the highest of the schedule
    momentum: float = MISSING
    nesterov: bool = MISSING
    weight_decay: float = MISSING


@dataclass
class AdamW:
    _target_: str = "torch.optim.AdamW"
    _partial_: bool = True
    lr: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING


@dataclass
class WarmupCosine:
    _target_: str = "training.schedule.warmup_cosine"
    _partial_: bool = True
    warmup: float = MISSING  # fraction of all steps


@dataclass
class OneCycle:
    _target_: str = "training.schedule.one_cycle"
    _partial_: bool = True
    warmup: float = MISSING  # fraction of all steps
    start: float = MISSING  # first learning rate as a fraction of optim.lr
    end: float = MISSING  # last one likewise


@dataclass
class Wandb:
    mode: WandbMode = MISSING
    project: str = MISSING
    entity: Optional[str] = None
    group: str = MISSING


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    # Choices of different types: each option brings its own from the classes above.
    attention: Any = MISSING
    data: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING
    wandb: Wandb = field(default_factory=Wandb)

    name: str = MISSING  # of the comparison a run belongs to
    out_dir: str = MISSING
    seed: int = MISSING
    epochs: int = MISSING
    batch_size: int = MISSING  # images per optimiser step
    grad_accum: int = MISSING  # pieces in which a batch passes the network
    eval_batch_size: int = MISSING
    label_smoothing: float = MISSING
    grad_clip: Optional[float] = MISSING  # largest norm of the gradient
    ema: Optional[float] = MISSING  # decay of the averaged weights, which are then evaluated
    device: str = MISSING  # auto, or a device of torch
    precision: Precision = MISSING
    channels_last: bool = MISSING
    compile: bool = MISSING
    # Of several processes: normalise over the whole batch, as one process does, or each its part.
    sync_batchnorm: bool = MISSING
    deterministic: bool = MISSING  # the same bits each time on a GPU too, more slowly
    resume: Optional[str] = MISSING  # auto: the run's own last checkpoint; or a checkpoint's path
    overwrite: bool = MISSING  # replace a run that is in the way
    checkpoint_minutes: Optional[float] = MISSING  # between checkpoints inside of an epoch
    max_minutes: Optional[float] = MISSING  # of the process, then stop; resume=auto goes on
    log_every: int = MISSING  # steps between readings of the loss


def register() -> None:
    """Make known to Hydra the types, under the names that the YAML files use, and a resolver.

    ``${if_augmented:${attention._target_},A,B}`` is A for networks with augmented convolutions and
    B for the others: the paper trains the two differently.
    """
    OmegaConf.register_new_resolver(
        "if_augmented",
        lambda target, there, otherwise: there if target == "models.AA" else otherwise,
        replace=True,
    )
    store = ConfigStore.instance().store
    store(name="schema", node=Config)
    for group, name, node in (
        ("attention", "none", NoAttentionConfig),
        ("attention", "aa", AugmentedConvConfig),
        ("attention", "se", SqueezeExciteConfig),
        ("attention", "ge", GatherExciteConfig),
        ("data", "cifar", Cifar),
        ("data", "lookup", Lookup),
        ("optim", "sgd", SGD),
        ("optim", "adamw", AdamW),
        ("schedule", "warmup_cosine", WarmupCosine),
        ("schedule", "one_cycle", OneCycle),
    ):
        store(group=f"schema/{group}", name=name, node=node)
