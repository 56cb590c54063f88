"""Every setting of train.py: its type, and a comment with its meaning, unit and range.

train.py refuses an unknown setting or a value of another type before it reads any data. Default
values are not here but in the YAML files next to this one: config.yaml, and a file for each option
of a group. docs/settings.md shows both together; after a change here or there,
``python scripts/settings.py`` writes it again.

``_target_`` names what Hydra builds from an option of a group; it is part of the option, not a
setting. ``_partial_`` leaves the rest of the arguments to train.py.
"""

import textwrap
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Optional, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

# These name, locate, speed up or report a run and change nothing in its result: Hydra names no
# folder after them, a checkpoint can be continued with other values, and compare.py passes them on
# to every run.
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
    "tracking.media",
    "tracking.weights",
    "data.root",
    "data.download",
)

# What later versions have added, with the value that was in effect before: settings of older files,
# which do not have the key, are read as if they had that value.
OPTIONAL: dict[str, Any] = {
    "init_from": None,
    "freeze": [],
    "model._target_": "models.ResNet",
    "model._partial_": True,
    "attention.blocks": "all",
    "attention.bias": False,
    "attention.init": "kaiming",
    "attention.qk_norm": False,
    "optim.decay": "all",
    "data.distance": None,
}

# OmegaConf reads these annotations at run time and knows `Union` and `Optional`, not `X | Y`.
# ruff: noqa: UP007, UP045


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Decay(Enum):
    all = "all"
    weights = "weights"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class AttentionDefaultsConfig:
    """The attention that suits a network: what ``attention=aa`` takes unless told otherwise."""

    # Default of attention.dk for this network.
    dk: Union[int, float] = MISSING
    # Default of attention.dv for this network.
    dv: Union[int, float] = MISSING
    # Default of attention.Nh for this network.
    Nh: int = MISSING
    # Default of attention.min_dkh for this network.
    min_dkh: int = MISSING
    # Default of attention.stages for this network.
    stages: list[int] = MISSING
    # Default of attention.init for this network.
    init: str = MISSING
    # Default of attention.qk_norm for this network.
    qk_norm: bool = MISSING


@dataclass
class ModelConfig:
    _target_: str = "models.ResNet"
    _partial_: bool = True
    # What the network is called in summaries and reports.
    name: str = MISSING
    # Kind of residual block: basic, bottleneck or preact (pre-activation, as in wide ResNets).
    block: str = MISSING
    # Blocks in each stage, at least 1 each and 1000 in all. Every stage but the first halves height
    # and width.
    depths: list[int] = MISSING
    # Channels of each stage, at least 1, as many entries as model.depths; a bottleneck block puts
    # out four times as many.
    widths: list[int] = MISSING
    # Output channels of the first convolution, at least 1.
    stem: int = MISSING
    # How a shortcut changes shape: projection (1x1 convolution), pad (average pooling, then zero
    # channels) or subsample (drops pixels, then zero channels).
    shortcut: str = MISSING
    # Where and how much to augment this network by default; attention=aa reads it.
    aa: AttentionDefaultsConfig = field(default_factory=AttentionDefaultsConfig)


@dataclass
class NoAttentionConfig:
    _target_: str = "models.NoAttention"


@dataclass
class ReplacingConfig:
    """What `models.attention.Replacing` has: attention, and the controls that replace it."""

    # Channels that attention, or its control, takes out of a block's output channels: a number of
    # channels (int, divisible by attention.Nh) or a fraction of them, above 0 and at most 1 (float,
    # the paper's upsilon).
    dv: Union[int, float] = MISSING
    # Attention heads, at least 1; a fraction attention.dv is rounded to a multiple of it.
    Nh: int = MISSING
    # Stages to augment, counted from 1, at least one of them.
    stages: list[int] = MISSING
    # Which of their blocks: all, unstrided (not the first one, which halves the map, but in stage
    # 1) or last (the last of each stage).
    blocks: str = MISSING


@dataclass
class AugmentedConvConfig(ReplacingConfig):
    _target_: str = "models.AA"
    # Key channels of an augmented convolution: a number of channels (an int such as 20, divisible
    # by attention.Nh) or a fraction of its output channels, above 0 and at most 2 (a float such as
    # 0.2, the paper's kappa). So 1 is a single channel, and 1.0 as many as the block puts out.
    dk: Union[int, float] = MISSING
    # Minimum key channels per head, at least 1, where attention.dk is a fraction.
    min_dkh: int = MISSING
    # How attention knows where a pixel is: relative (learned, the paper's), none, sine or coord.
    position: str = MISSING
    # Whether queries, keys and values have a bias.
    bias: bool = MISSING
    # How the convolutions that give queries, keys and values and that mix the heads begin: torch
    # (variance 1 / (3 fan_in)), glorot (2 / (fan_in + fan_out), the paper's listing) or kaiming
    # (2 / fan_in, with which attention begins nearly one-hot in post-activation networks).
    init: str = MISSING
    # Whether the queries and keys of each head are divided by their root mean square, which keeps
    # attention soft however large the features grow; not in the paper.
    qk_norm: bool = MISSING
    # Implementation of attention: auto (the fastest measured), reference, sdpa, tiled, native
    # or fused; see aaconv.attention_2d. All compute the same, up to rounding.
    backend: str = MISSING


@dataclass
class RemovedConfig(ReplacingConfig):
    _target_: str = "models.Removed"


@dataclass
class PointwiseConfig(ReplacingConfig):
    _target_: str = "models.Pointwise"


@dataclass
class GlobalMeanConfig(ReplacingConfig):
    _target_: str = "models.GlobalMean"


@dataclass
class SqueezeExciteConfig:
    _target_: str = "models.SE"
    # Reduction: C channels are squeezed to C / ratio, at least 1.
    ratio: int = MISSING


@dataclass
class GatherExciteConfig:
    _target_: str = "models.GE"


@dataclass
class CifarConfig:
    _target_: str = "data.load_cifar"
    # Which to load: cifar10, cifar100 or cifar100_coarse (its 20 superclasses). Choose the option
    # data=cifar10 and so on instead of setting it.
    name: str = MISSING
    # Folder that holds torchvision's files, or that they are downloaded into.
    root: str = MISSING
    # Whether to download files that are missing or damaged.
    download: bool = MISSING
    # Training images to hold out and evaluate on instead of the test set, for tuning: 0 (evaluate
    # on the test set) to 49,999.
    val_size: int = MISSING
    # Pixels of zeros on each side before a random crop to 32x32: 0 (no crop) to 31.
    crop_pad: int = MISSING
    # Whether to mirror training images left to right with probability 1/2.
    flip: bool = MISSING
    # Side in pixels of a square of the mean colour at a random position: 0 (no cutout) to 32.
    cutout: int = MISSING


@dataclass
class LookupConfig:
    _target_: str = "data.make_lookup"
    # Training images to generate, held-out ones included, 1 to 1,000,000.
    train_size: int = MISSING
    # Test images to generate, 1 to 1,000,000.
    test_size: int = MISSING
    # Standard deviation of the noise on each pixel value, 0 to 1, where white is 1.
    noise: float = MISSING
    # Pixels of background between a cue that is a stripe and shapes in a column: 1 to 24; null has
    # the cue in one corner and the shapes along the two far sides, 24 pixels away or more.
    distance: Optional[int] = MISSING
    # Seed of the images themselves; apart from `seed`, so that seeds share the same images.
    data_seed: int = MISSING
    # Training images to hold out and evaluate on instead of the test set: 0 (evaluate on the test
    # set) to data.train_size - 1.
    val_size: int = MISSING
    # Pixels of zeros on each side before a random crop to 32x32: 0 (no crop) to 31. A crop may
    # remove the cue.
    crop_pad: int = MISSING
    # Whether to mirror training images left to right with probability 1/2.
    flip: bool = MISSING
    # Side in pixels of a square of the mean colour at a random position: 0 (no cutout) to 32. It
    # may cover the cue.
    cutout: int = MISSING


@dataclass
class FolderConfig:
    _target_: str = "data.load_folder"
    # Folder with train/CLASS/ and val/CLASS/, which hold the images of each class.
    root: str = MISSING
    # What the data set is called in results; runs on different images need different names. By
    # default the last part of data.root.
    name: str = MISSING
    # Height and width in pixels that all images are brought to, 1 to 1024: scaled with their sides
    # in proportion until they cover it, and cut at the sides that stick out.
    size: int = MISSING
    # Training images to hold out and evaluate on instead of val/: 0 (evaluate on val/) to all but
    # one of them.
    val_size: int = MISSING
    # Pixels of zeros on each side before a random crop to data.size: 0 (no crop) to data.size - 1.
    crop_pad: int = MISSING
    # Whether to mirror training images left to right with probability 1/2.
    flip: bool = MISSING
    # Side in pixels of a square of the mean colour at a random position, from 0 (no cutout) to
    # all of data.size.
    cutout: int = MISSING


@dataclass
class SGDConfig:
    _target_: str = "torch.optim.SGD"
    _partial_: bool = True
    # Learning rate at the peak of the schedule, above 0.
    lr: float = MISSING
    # Momentum, in [0, 1).
    momentum: float = MISSING
    # Whether momentum is Nesterov's; needs optim.momentum above 0.
    nesterov: bool = MISSING
    # Factor of the weights that is added to their gradients, at least 0; optim.decay says of which.
    weight_decay: float = MISSING
    # Which parameters are decayed: all, or weights (not biases, batch normalization and the
    # relative tables).
    decay: Decay = MISSING


@dataclass
class AdamWConfig:
    _target_: str = "torch.optim.AdamW"
    _partial_: bool = True
    # Learning rate at the peak of the schedule, above 0.
    lr: float = MISSING
    # Decay rates of the running means of gradients and of their squares: two numbers in [0, 1).
    betas: list[float] = MISSING
    # Weights shrink by this times the learning rate at each step, at least 0; optim.decay says
    # which of them do.
    weight_decay: float = MISSING
    # Which parameters are decayed: all, or weights (not biases, batch normalization and the
    # relative tables).
    decay: Decay = MISSING


@dataclass
class WarmupCosineConfig:
    _target_: str = "training.schedule.warmup_cosine"
    _partial_: bool = True
    # Fraction of all steps in which the learning rate rises, in [0, 1).
    warmup: float = MISSING


@dataclass
class OneCycleConfig:
    _target_: str = "training.schedule.one_cycle"
    _partial_: bool = True
    # Fraction of all steps in which the learning rate rises, 0 to 1.
    warmup: float = MISSING
    # Learning rate of the first step as a fraction of optim.lr, above 0 and at most 1.
    start: float = MISSING
    # Learning rate of the last step as a fraction of optim.lr, above 0 and at most 1.
    end: float = MISSING


@dataclass
class WandbConfig:
    # Where Weights & Biases keeps the run: online, offline (on disk), disabled, or auto (what the
    # environment's WANDB_MODE says; without it online if credentials are found, else offline).
    mode: WandbMode = MISSING
    # Project on the dashboard; must not be empty or contain a slash, a backslash or any of # ? % :
    project: str = MISSING
    # User or team that owns the project; null is the default one of the account.
    entity: Optional[str] = MISSING
    # Group of the run on the dashboard.
    group: str = MISSING


@dataclass
class TrackingConfig:
    # Whether the dashboard also gets what there is to see: predictions, accuracy by class and
    # confusion at the end, attention maps after the first, the middle and the last epoch.
    media: bool = MISSING
    # Whether it gets the weights at the end, with the settings they belong to.
    weights: bool = MISSING


@dataclass
class Config:
    # The residual network; see the group model.
    model: ModelConfig = field(default_factory=ModelConfig)
    # What its blocks have in addition to convolutions; see the group attention. This group and the
    # next three are of type Any because each option has a class of its own.
    attention: Any = MISSING
    # The images; see the group data.
    data: Any = MISSING
    # The optimizer; see the group optim.
    optim: Any = MISSING
    # The learning rate over the steps; see the group schedule.
    schedule: Any = MISSING
    # Tracking with Weights & Biases; see the group tracking.
    wandb: WandbConfig = field(default_factory=WandbConfig)
    # What else it gets; see the group tracking.
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    # Name of the experiment; runs go to out_dir/name. Must not be empty.
    name: str = MISSING
    # Folder for the results of all experiments. Must not be empty.
    out_dir: str = MISSING
    # Seed of initialisation, order and augmentation, 0 to 2^32 - 1.
    seed: int = MISSING
    # Epochs to train, 1 to 1,000,000.
    epochs: int = MISSING
    # Images in each optimizer step, over all processes; at least 1 and divisible by grad_accum
    # times the number of processes.
    batch_size: int = MISSING
    # Micro-batches that each batch is split into to save memory, at least 1.
    grad_accum: int = MISSING
    # Images in each batch of an evaluation, per process, at least 1.
    eval_batch_size: int = MISSING
    # Label smoothing of the cross-entropy loss, in [0, 1).
    label_smoothing: float = MISSING
    # Maximum norm of the gradient, above 0; null does not clip.
    grad_clip: Optional[float] = MISSING
    # Decay per step of an exponential moving average of the weights, which is then evaluated
    # instead of the weights, between 0 and 1; null keeps none.
    ema: Optional[float] = MISSING
    # Device to train on: auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:1, or
    # another accelerator that torch finds (mps, xpu: in float32, not tried).
    device: str = MISSING
    # Precision of convolutions and matrix products: auto (bf16 on a CPU or CUDA GPU with units for
    # it; else fp16 on a CUDA GPU, fp32 on other devices), fp32 (TF32 on a CUDA GPU), bf16 or fp16.
    precision: Precision = MISSING
    # Whether to store feature maps with the channels last, which is faster on most devices.
    channels_last: bool = MISSING
    # Whether to compile the network with torch.compile.
    compile: bool = MISSING
    # With several processes, whether batch normalisation takes its statistics over the whole batch,
    # as a single process does, instead of over each process's shard.
    sync_batchnorm: bool = MISSING
    # Whether to use only deterministic algorithms, so that a GPU repeats a run bit for bit; slower.
    deterministic: bool = MISSING
    # Trained network to begin with: a run's folder, its weights.safetensors or a checkpoint. What
    # fits is taken, and a table says what was not; the epochs and the learning rate's schedule are
    # those of a new run. null begins with new weights.
    init_from: Optional[str] = MISSING
    # Modules that are not trained and keep the statistics of their normalisation, such as
    # [conv,bn_in,stages.0]; [] trains all.
    freeze: list[str] = MISSING
    # Checkpoint to continue from: null (start from scratch), auto (the run's own last one, if there
    # is one) or a path.
    resume: Optional[str] = MISSING
    # Whether to replace a run that is already in the folder.
    overwrite: bool = MISSING
    # Minutes between checkpoints within an epoch, above 0; null saves only at the end of an epoch.
    checkpoint_minutes: Optional[float] = MISSING
    # Minutes after which the process saves a checkpoint and stops, above 0; resume=auto continues
    # it. null sets no limit.
    max_minutes: Optional[float] = MISSING
    # Steps between readings of the loss, which wait for the GPU, at least 1.
    log_every: int = MISSING


# Group, name and type of the schemas that the YAML files of a group's options refer to.
OPTIONS = (
    ("attention", "none", NoAttentionConfig),
    ("attention", "aa", AugmentedConvConfig),
    ("attention", "se", SqueezeExciteConfig),
    ("attention", "ge", GatherExciteConfig),
    ("attention", "removed", RemovedConfig),
    ("attention", "pointwise", PointwiseConfig),
    ("attention", "mean", GlobalMeanConfig),
    ("data", "cifar", CifarConfig),
    ("data", "lookup", LookupConfig),
    ("data", "folder", FolderConfig),
    ("optim", "sgd", SGDConfig),
    ("optim", "adamw", AdamWConfig),
    ("schedule", "warmup_cosine", WarmupCosineConfig),
    ("schedule", "one_cycle", OneCycleConfig),
)


def _option_groups() -> str:
    groups = sorted(path for path in Path(__file__).parent.iterdir() if any(path.glob("*.yaml")))
    lines = []
    for group in groups:
        options = " ".join(sorted(path.stem for path in group.glob("*.yaml")))
        lines.append(textwrap.fill(f"{group.name:<12}{options}", 90, subsequent_indent=" " * 12))
    return textwrap.indent("\n".join(lines), "  ")


def register() -> None:
    """Register the types with Hydra, under the names that the YAML files use, and resolvers.

    ``${if_augmented:${attention._target_},A,B}`` is A for networks with augmented convolutions, and
    for the controls of these, and B for all others: the paper trains the two differently.
    ``${no_effect_on_folder:}`` lists the settings that no folder is named by, ``${option_groups:}``
    the groups and their options, ``${base_name:PATH}`` the last part of a path.
    """
    augmented = {kind._target_ for _, _, kind in OPTIONS if issubclass(kind, ReplacingConfig)}
    OmegaConf.register_new_resolver(
        "base_name", lambda path: Path(path).absolute().name, replace=True
    )
    OmegaConf.register_new_resolver(
        "if_augmented",
        lambda target, there, otherwise: there if target in augmented else otherwise,
        replace=True,
    )
    OmegaConf.register_new_resolver(
        "no_effect_on_folder", lambda: ["seed", "tracking", *NO_EFFECT_ON_RESULT], replace=True
    )
    OmegaConf.register_new_resolver("option_groups", _option_groups, replace=True)
    store = ConfigStore.instance().store
    store(name="schema", node=Config)
    for group, name, node in OPTIONS:
        store(group=f"schema/{group}", name=name, node=node)
