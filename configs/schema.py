"""Every setting of train.py: its type and, by `configs.setting`, its meaning, unit and range.

train.py rejects unknown settings and values of another type before it reads any data. Default
values are not here but in the YAML files next to this one: config.yaml, and a file for each option
of a group. docs/settings.md shows both together; after a change here or there, run
``python scripts/settings.py`` to update it.

``_target_`` names what Hydra builds from an option of a group; it is part of the option, not a
setting. ``_partial_`` leaves the remaining arguments to train.py.
"""

import os
import textwrap
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from configs.setting import setting

# Larger values are typing errors that would lead to an endless run or exhaust the memory.
MAX_INT = 2**31 - 1
MAX_IMAGES = 1_000_000


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
    """The attention that suits a network: the defaults of ``attention=aa``."""

    dk: int | float = setting("Default of attention.dk for this network.")
    dv: int | float = setting("Default of attention.dv for this network.")
    Nh: int = setting("Default of attention.Nh for this network.")
    min_dkh: int = setting("Default of attention.min_dkh for this network.")
    stages: list[int] = setting("Default of attention.stages for this network.")
    blocks: str = setting("Default of attention.blocks for this network.")
    init: str = setting("Default of attention.init for this network.")
    qk_norm: bool = setting("Default of attention.qk_norm for this network.")


@dataclass
class ModelConfig:
    _target_: str = "models.ResNet"
    _partial_: bool = True
    name: str = setting("What the network is called in summaries and reports.")
    block: str = setting(
        "Kind of residual block: basic, bottleneck, preact (pre-activation, as in wide ResNets) "
        "or alternet (preact; where attention=aa applies, attention replaces the convolutions)."
    )
    depths: list[int] = setting(
        "Blocks in each stage, at least 1 each and 1000 in all. Every stage but the first "
        "halves height and width."
    )
    widths: list[int] = setting(
        "Channels of each stage, at least 1, as many entries as model.depths; a bottleneck block "
        "outputs four times as many."
    )
    stem: int = setting("Output channels of the first convolution, at least 1.")
    shortcut: str = setting(
        "How a shortcut changes shape: projection (1x1 convolution), pad (average pooling, then "
        "zero channels) or subsample (drops pixels, then zero channels)."
    )
    strided_stem: bool = setting(
        "Whether the network begins with a 7x7 convolution and a max pooling, each of stride 2, as "
        "ImageNet's ResNets do, instead of a 3x3 convolution; attention on maps of more than 20x20 "
        "is then pooled by 2, as in the paper.",
        before=False,
    )
    drop_path: float = setting(
        "Stochastic depth: probability of skipping the last block for an image in training; block "
        "l of L is skipped with l / L of it.",
        at_least=0,
        below=1,
        before=0.0,
    )
    dropout: float = setting(
        "Dropout between the two convolutions of a block, as in wide ResNets; needs "
        "model.block=preact or alternet.",
        at_least=0,
        below=1,
        before=0.0,
    )
    # Where and how much to augment this network by default; attention=aa reads it.
    aa: AttentionDefaultsConfig = field(default_factory=AttentionDefaultsConfig)


@dataclass
class NoAttentionConfig:
    _target_: str = "models.NoAttention"


@dataclass
class ReplacingConfig:
    """Settings of `models.attention.Replacing`: attention and the controls that replace it."""

    dv: int | float = setting(
        "Channels that attention, or its control, takes out of a block's output channels: a "
        "number of channels (int, divisible by attention.Nh) or a fraction of them, above 0 and "
        "at most 1 (float, the paper's upsilon)."
    )
    Nh: int = setting(
        "Attention heads, at least 1; a fraction attention.dv is rounded to a multiple of it."
    )
    stages: list[int] = setting("Stages to augment, counted from 1, at least one of them.")
    blocks: str = setting(
        "Which blocks of these stages: all, unstrided (all but the first block of a stage, which "
        "halves the map; in stage 1 it does not and counts) or last (the last of each stage)."
    )


@dataclass
class AugmentedConvConfig(ReplacingConfig):
    _target_: str = "models.AA"
    dk: int | float = setting(
        "Key channels of an augmented convolution: a number of channels (an int such as 20, "
        "divisible by attention.Nh) or a fraction of its output channels, above 0 and at most 2 "
        "(a float such as 0.2, the paper's kappa). 1.0 is as many as the block outputs; 1 and 2, "
        "easily meant as fractions, are refused."
    )
    min_dkh: int = setting(
        "Minimum key channels per head, at least 1, where attention.dk is a fraction."
    )
    position: str = setting(
        "How attention knows where a pixel is: relative (learned, the paper's), none, sine or "
        "coord."
    )
    bias: bool = setting("Whether queries, keys and values have a bias.")
    init: str = setting(
        "Initialization of the convolutions that give queries, keys and values and that mix the "
        "heads: torch (variance 1 / (3 fan_in)), glorot (2 / (fan_in + fan_out), the paper's "
        "listing) or kaiming (2 / fan_in, with which attention begins nearly one-hot in "
        "post-activation networks)."
    )
    qk_norm: bool = setting(
        "Whether the queries and keys of each head are divided by their root mean square, which "
        "keeps attention soft however large the features grow; not in the paper."
    )
    backend: str = setting(
        "Implementation of attention: auto (the fastest measured on a CPU; on a CUDA GPU fused, "
        "after a trial), reference, sdpa, tiled, native or fused; see aaconv.attention_2d. All "
        "compute the same, up to rounding."
    )
    dropout: float = setting(
        "Probability of dropping an attention weight in training. Above 0, attention is computed "
        "by the reference backend, which holds all weights in memory and is slower.",
        at_least=0,
        below=1,
        before=0.0,
    )


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
    ratio: int = setting("Reduction: C channels are squeezed to C / ratio, at least 1.")


@dataclass
class GatherExciteConfig:
    _target_: str = "models.GE"


@dataclass
class CifarConfig:
    _target_: str = "data.load_cifar"
    name: str = setting(
        "Which to load: cifar10, cifar100 or cifar100_coarse (its 20 superclasses). Choose the "
        "option data=cifar10 and so on instead of setting it."
    )
    root: str = setting(
        "Folder that holds torchvision's files, or that they are downloaded into.",
        decides_result=False,
    )
    download: bool = setting(
        "Whether to download files that are missing or damaged.",
        decides_result=False,
    )
    val_size: int = setting(
        "Training images to hold out and evaluate on instead of the test set, for tuning; 0 "
        "evaluates on the test set.",
        at_least=0,
        at_most=49_999,
    )


@dataclass
class LookupConfig:
    _target_: str = "data.make_lookup"
    train_size: int = setting(
        "Training images to generate, held-out ones included.",
        at_least=1,
        at_most=MAX_IMAGES,
    )
    test_size: int = setting("Test images to generate.", at_least=1, at_most=MAX_IMAGES)
    noise: float = setting(
        "Standard deviation of the noise on each pixel value, where white is 1.",
        at_least=0,
        at_most=1,
    )
    distance: int | None = setting(
        "Pixels of background between a cue that is a stripe and shapes in a column. null has the "
        "cue in one corner and the shapes along the two far sides, 24 pixels away or more.",
        at_least=1,
        at_most=24,
    )
    data_seed: int = setting(
        "Seed of the images themselves; separate from `seed`, so that runs with different seeds "
        "share the same images."
    )
    val_size: int = setting(
        "Training images to hold out and evaluate on instead of the test set: 0 (evaluate on "
        "the test set) to data.train_size - 1.",
        at_least=0,
    )


@dataclass
class FolderConfig:
    _target_: str = "data.load_folder"
    root: str = setting(
        "Folder with train/CLASS/ and val/CLASS/ (or valid/, or test/), which hold the images of "
        "each class; or with CLASS/ alone, which needs data.val_size.",
        decides_result=False,
    )
    name: str = setting(
        "What the data set is called in results; runs on different images need different names. "
        "By default the last part of data.root."
    )
    # An int or a list of two ints, which no annotation that OmegaConf supports can express.
    size: Any = setting(
        "Height and width in pixels of all images, one number or [height, width]. Each image is "
        "scaled, keeping its aspect ratio, until it covers them; the excess is center-cropped.",
        at_least=1,
        at_most=1024,
    )
    val_size: int = setting(
        "Training images to hold out, in proportion to the classes, and evaluate on instead of "
        "val/: 0 (evaluate on val/) to all but one of each class.",
        at_least=0,
    )
    white: float | None = setting(
        "The value of white in gray images of more than 8 bits, such as 4095 or 1.0. null is "
        "65535 for whole numbers and refuses floating-point numbers.",
        above=0,
        before=None,
    )
    skip_damaged: bool = setting(
        "Whether to leave out images that cannot be read; otherwise they end the run.",
        before=False,
    )
    max_pixels: int = setting(
        "Pixels of the largest image that is accepted; a larger one may be a decompression bomb.",
        at_least=1,
        before=2**28,
    )


@dataclass
class AugmentationConfig:
    _target_: str = "data.Augmentation"
    crop_pad: int = setting(
        "Pixels added on each side before a random crop to the original size, less than that "
        "size; 0 does not crop.",
        at_least=0,
    )
    padding: str = setting(
        "What these pixels are: zeros, or reflect (the image mirrored at its edge).",
        before="zeros",
    )
    flip: bool | str = setting(
        "Whether to mirror training images left to right: false, true (with probability 1/2), or "
        "alternating (each image in every other epoch, half of them in the first)."
    )
    cutout: int = setting(
        "Side in pixels of a square of the mean color at a random position, at most the image's "
        "side; 0 turns it off.",
        at_least=0,
    )
    policy: str | None = setting(
        "Operations that move or recolor the pixels, before cutout: trivial (TrivialAugment: one "
        "of 14, of any strength), rand (RandAugment: several, of one strength), auto "
        "(AutoAugment's pairs for CIFAR-10), or null.",
        before=None,
    )
    rand_ops: int = setting(
        "Operations of augmentation.policy=rand.", at_least=1, at_most=14, before=2
    )
    rand_magnitude: int = setting(
        "Magnitude of the operations of augmentation.policy=rand.",
        at_least=0,
        at_most=30,
        before=9,
    )
    erasing: float = setting(
        "Probability that a random rectangle of 2 to 33 % of the image is set to the mean color.",
        at_least=0,
        at_most=1,
        before=0,
    )
    mixup: float = setting(
        "Mixup: alpha of Beta(alpha, alpha), the distribution of an image's own weight when it and "
        "its label are mixed with another's; 0 turns it off. With augmentation.cutmix, too, each "
        "image gets one of the two.",
        at_least=0,
        before=0,
    )
    cutmix: float = setting(
        "CutMix: the same, but a rectangle of the other image is pasted in instead.",
        at_least=0,
        before=0,
    )


@dataclass
class RateFactorsConfig:
    """Parameters with a learning rate of their own, a multiple of the schedule's.

    Weight decay scales with the rate.
    """

    norm_bias: float = setting(
        "Factor of the learning rate of normalization biases.", above=0, before=1.0
    )
    attention: float = setting(
        "Factor of the learning rate of attention: all of an augmented convolution except its "
        "plain convolution.",
        above=0,
        before=1.0,
    )
    head: float = setting("Factor of the learning rate of the last layer.", above=0, before=1.0)


@dataclass
class SGDConfig:
    _target_: str = "torch.optim.SGD"
    _partial_: bool = True
    lr: float = setting("Learning rate at the peak of the schedule.", above=0)
    momentum: float = setting(
        "Decay of the running sum of gradients per step.", at_least=0, below=1
    )
    nesterov: bool = setting("Whether momentum is Nesterov's; needs optim.momentum above 0.")
    weight_decay: float = setting(
        "Factor of the weights that is added to their gradients; optim.decay selects which "
        "parameters.",
        at_least=0,
        at_most=1_000_000,
    )
    decay: Decay = setting(
        "Which parameters are decayed: all, or weights (not biases, batch normalization and the "
        "relative tables)."
    )
    lr_factors: RateFactorsConfig = field(default_factory=RateFactorsConfig)


@dataclass
class AdamWConfig:
    _target_: str = "torch.optim.AdamW"
    _partial_: bool = True
    lr: float = setting("Learning rate at the peak of the schedule.", above=0)
    betas: list[float] = setting(
        "Decay rates of the running means of gradients and of their squares.",
        length=2,
        at_least=0,
        below=1,
    )
    weight_decay: float = setting(
        "At each step, weights shrink by this times the learning rate; optim.decay selects which "
        "parameters.",
        at_least=0,
        at_most=1_000_000,
    )
    decay: Decay = setting(
        "Which parameters are decayed: all, or weights (not biases, batch normalization and the "
        "relative tables)."
    )
    lr_factors: RateFactorsConfig = field(default_factory=RateFactorsConfig)


@dataclass
class ScheduleConfig:
    """Settings that every schedule has."""

    _target_: str = MISSING
    _partial_: bool = True
    warmup: float = setting(
        "Fraction of all steps in which the learning rate rises.", at_least=0, below=1
    )


@dataclass
class WarmupCosineConfig(ScheduleConfig):
    _target_: str = "training.schedule.warmup_cosine"


@dataclass
class OneCycleConfig(ScheduleConfig):
    _target_: str = "training.schedule.one_cycle"
    warmup: float = setting(
        "Fraction of all steps in which the learning rate rises.", at_least=0, at_most=1
    )
    start: float = setting(
        "Learning rate of the first step as a fraction of optim.lr.", above=0, at_most=1
    )
    end: float = setting(
        "Learning rate of the last step as a fraction of optim.lr.", above=0, at_most=1
    )


@dataclass
class StepConfig(ScheduleConfig):
    _target_: str = "training.schedule.step"
    milestones: list[float] = setting(
        "Fractions of all steps after each of which the learning rate is multiplied by "
        "schedule.factor.",
        above=0,
        below=1,
    )
    factor: float = setting(
        "What the learning rate is multiplied by at each of schedule.milestones.",
        above=0,
        at_most=1,
    )


@dataclass
class ConstantConfig(ScheduleConfig):
    _target_: str = "training.schedule.constant"


@dataclass
class WandbConfig:
    mode: WandbMode = setting(
        "Where Weights & Biases keeps the run: online, offline (on disk), disabled, or auto "
        "(what the environment's WANDB_MODE says; without it online if credentials are found, "
        "else offline).",
        decides_result=False,
    )
    project: str = setting(
        "Project on the dashboard; must not be empty or contain a slash, a backslash or any of "
        "# ? % :",
        decides_result=False,
    )
    entity: str | None = setting(
        "User or team that owns the project; null is the default one of the account.",
        decides_result=False,
    )
    group: str = setting(
        "Group of the run on the dashboard.",
        decides_result=False,
    )
    tags: list[str] = setting(
        "Tags of the run on the dashboard, in addition to its network, attention and data; [] "
        "uses those of the environment variable WANDB_TAGS, separated by commas.",
        decides_result=False,
    )
    notes: str | None = setting(
        "Description of the run on the dashboard; null is none.",
        decides_result=False,
    )


@dataclass
class TrackingConfig:
    media: bool = setting(
        "Whether to log figures and tables: predictions, accuracy by class and confusion at the "
        "end, attention maps after the first, the middle and the last epoch.",
        decides_result=False,
    )
    weights: bool = setting(
        "Whether to upload the trained weights with their settings.",
        decides_result=False,
    )


@dataclass
class Config:
    # The residual network; see the group model.
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: Any = setting(
        "What its blocks have in addition to convolutions; see the group attention. attention, "
        "data, optim, and schedule are of type Any because each option has a class of its own."
    )
    data: Any = setting("The images; see the group data.")
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optim: Any = setting("The optimizer; see the group optim.")
    schedule: Any = setting("The learning rate over the steps; see the group schedule.")
    # Tracking with Weights & Biases; see the group tracking.
    wandb: WandbConfig = field(default_factory=WandbConfig)
    # What else is logged or uploaded; see the group tracking.
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    name: str = setting(
        "Name of the experiment; runs go to out_dir/name. Must not be empty.",
        decides_result=False,
    )
    out_dir: str = setting(
        "Folder for the results of all experiments. Must not be empty.",
        decides_result=False,
    )
    run_dir: str | None = setting(
        "Folder of the run; null creates one below out_dir/name, named by the overrides that "
        "change the result and by the seed.",
        decides_result=False,
    )
    seed: int = setting(
        "Seed of initialization, order and augmentation.", at_least=0, at_most=2**32 - 1
    )
    epochs: int = setting("Epochs to train.", at_least=1, at_most=1_000_000)
    batch_size: int = setting(
        "Images in each optimizer step, over all processes; divisible by grad_accum times the "
        "number of processes.",
        at_least=1,
        at_most=MAX_INT,
    )
    grad_accum: int = setting(
        "Micro-batches that each batch is split into, to save memory.",
        at_least=1,
        at_most=MAX_INT,
    )
    eval_batch_size: int = setting(
        "Images in each batch of an evaluation, per process.",
        decides_result=False,
        at_least=1,
        at_most=MAX_INT,
    )
    label_smoothing: float = setting(
        "Label smoothing of the cross-entropy loss.", at_least=0, below=1
    )
    # null, a word or a list, which no annotation that OmegaConf supports can express.
    class_weights: Any = setting(
        "Weights of the training loss by class: balanced (inverse to the number of images in the "
        "class) or a list with one number per class. null weights all images equally.",
        above=0,
        before=None,
    )
    balanced_sampling: bool = setting(
        "Whether an epoch draws each class equally often instead of each image once; the number "
        "of images per epoch stays the same.",
        before=False,
    )
    grad_clip: float | None = setting(
        "Maximum norm of the gradient. null does not clip.",
        above=0,
    )
    ema: float | None = setting(
        "Decay per step of an exponential moving average of the weights, which is then evaluated "
        "instead of the weights. null keeps none.",
        above=0,
        below=1,
    )
    # It affects no score, but a run that is resumed with another value would lack the weights.
    keep_best: bool = setting(
        "Whether the run also writes best.safetensors at its end, the network after the epoch with "
        "the best top-1 accuracy on held-out images; scores stay those of the last epoch.",
        before=False,
    )
    device: str = setting(
        "Device to train on: auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:1, "
        "or another accelerator that torch finds (mps, xpu: in float32, untested).",
        decides_result=False,
    )
    precision: Precision = setting(
        "Precision of convolutions and matrix products: auto (bf16 on a CPU or CUDA GPU that "
        "supports it in hardware; else fp16 on a CUDA GPU, fp32 on other devices), fp32 (TF32 on "
        "a CUDA GPU), bf16 or fp16."
    )
    channels_last: bool = setting(
        "Whether to store feature maps with the channels last, which is faster on most devices."
    )
    compile: bool = setting("Whether to compile the network with torch.compile.")
    sync_batchnorm: bool = setting(
        "With several processes, whether batch normalization uses the statistics of the whole "
        "batch, as a single process does, instead of each process's shard."
    )
    deterministic: bool = setting(
        "Whether to use only deterministic algorithms, so that a GPU repeats a run bit for bit; "
        "slower."
    )
    init_from: str | None = setting(
        "Trained network to start from: a run's folder, its weights.safetensors or a checkpoint, "
        "or the state dict of a ResNet of torchvision or timm (.pth, .pt, .safetensors). What "
        "fits is loaded, and a table lists what did not; the epochs and the learning-rate "
        "schedule are those of a new run. null starts with random weights."
    )
    freeze: list[str] = setting(
        "Modules that are not trained and keep their normalization statistics, such as "
        "[conv,bn_in,stages.0]; [] trains all."
    )
    resume: str | None = setting(
        "Checkpoint to continue from: null (start from scratch), auto (the run's own last one, "
        "if there is one) or a path.",
        decides_result=False,
    )
    overwrite: bool = setting(
        "Whether to replace a run that is already in the folder.",
        decides_result=False,
    )
    checkpoint_minutes: float | None = setting(
        "Minutes between checkpoints, within an epoch and across epochs: the most that a kill can "
        "cost. null saves after every epoch instead. A run is also saved after the first epoch "
        "that a process finishes, when it is stopped, and at its end.",
        decides_result=False,
        above=0,
    )
    max_minutes: float | None = setting(
        "Minutes after which the process saves a checkpoint and stops; resume=auto continues it. "
        "null sets no limit.",
        decides_result=False,
        above=0,
    )
    log_every: int = setting(
        "Steps between readings of the loss, which wait for the GPU.",
        decides_result=False,
        at_least=1,
        at_most=MAX_INT,
    )


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
    ("schedule", "step", StepConfig),
    ("schedule", "constant", ConstantConfig),
)


def fields_below(kind: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield the settings of a config class, including nested ones, by their dotted names."""
    for own in fields(kind):
        if is_dataclass(own.type):
            yield from fields_below(own.type, f"{prefix}{own.name}.")
        elif not own.name.startswith("_"):
            yield prefix + own.name, own


# All settings; one that several options share is listed once for each of them.
SETTINGS = [
    *fields_below(Config),
    *(pair for group, _, kind in OPTIONS for pair in fields_below(kind, f"{group}.")),
]
BEFORE = {name: own.metadata["before"] for name, own in SETTINGS}
# Settings that change nothing in a result; see `setting`.
NO_EFFECT = frozenset(name for name, own in SETTINGS if not own.metadata["decides_result"])


def decides_result(name: str) -> bool:
    """Whether the setting with this dotted name may change a run's result by itself.

    ``model.aa`` does not: it only holds the defaults of ``attention``, which has the final values.
    """
    return name not in NO_EFFECT and not name.startswith("model.aa.")


def is_as_before(name: str, value: Any) -> bool:
    """Whether ``value`` is what runs did before this setting was added; see `setting`."""
    before = BEFORE.get(name, MISSING)
    return before is not MISSING and bool(value == before)


def names_folder(name: str) -> bool:
    """Whether an override of this group or setting is part of the name of a run's folder.

    The seed has a folder level of its own, and the options of tracking do not affect results.
    """
    return name not in (*NO_EFFECT, "seed", "tracking") and not name.startswith("hydra.")


def unknown_setting(where: str, key: str, kind: Any) -> str:
    """Return a one-line error on a key that ``kind``, the config type at ``where``, lacks."""
    known = [f.name for f in fields(kind) if f.name[0] != "_"]
    there = f"{_with_option(where.rstrip('.'), kind)} has" if where else "there are"
    return f"{where}{key}: unknown setting {key}; {there} {', '.join(known) or 'no settings'}"


def _with_option(group: str, kind: Any) -> str:
    """Return, say, ``attention=none`` if ``kind`` is the type of that option, else ``group``."""
    options = [name for there, name, k in OPTIONS if (there, k) == (group, kind)]
    return f"{group}={options[0]}" if options and group != "data" else group


def is_text(key: str) -> bool:
    """Whether the setting with this dotted name is free text or a path, as all of Hydra's count."""
    texts = (str, str | None)
    return key.startswith("hydra.") or any(
        name == key and field.type in texts for name, field in SETTINGS
    )


def _option_groups() -> str:
    lines: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*/*.yaml")):
        group = path.parent.name
        lines[group] = f"{lines.get(group, f'  {group:<13}')} {path.stem}"
    indent = " " * 16
    return "\n".join(textwrap.fill(line, 92, subsequent_indent=indent) for line in lines.values())


def _register() -> None:
    """Register the types with Hydra, under the names that the YAML files use, and resolvers.

    ``${if_augmented:${attention._target_},A,B}`` is A for networks with augmented convolutions or
    controls for these and B for all others: the paper trains the two differently.
    ``${option_groups:}`` lists the groups and their options, ``${base_name:PATH}`` is the last part
    of a path, ``${expand_user:PATH}`` a path without ``~``.
    """
    augmented = {kind._target_ for _, _, kind in OPTIONS if issubclass(kind, ReplacingConfig)}
    OmegaConf.register_new_resolver(
        "base_name", lambda path: Path(os.path.abspath(os.path.expanduser(path))).name, replace=True
    )
    OmegaConf.register_new_resolver("expand_user", os.path.expanduser, replace=True)
    OmegaConf.register_new_resolver(
        "if_augmented",
        lambda target, there, otherwise: there if target in augmented else otherwise,
        replace=True,
    )
    OmegaConf.register_new_resolver("option_groups", _option_groups, replace=True)
    store = ConfigStore.instance().store
    store(name="schema", node=Config)
    for group, name, node in OPTIONS:
        store(group=f"schema/{group}", name=name, node=node)


# All code that reads settings, including those of a run's folder, imports this module.
_register()
