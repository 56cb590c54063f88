"""Trained networks as files that explain themselves: saved by a run, rebuilt from the file alone.

A run ends with two files side by side: ``weights.safetensors``, which other tools open too, and
``config.json``, which says what network the weights are of, what its classes are called and how its
images are normalized. A checkpoint, ``last.pt``, has the same inside. Loading runs no code of a
file: weights are read as tensors, and the description as plain values.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import BaseModel, Field, model_validator, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from aaconv.text import one_line
from models.attention import ATTENTIONS, Attention
from models.fields import Count, Finite, Format, Text, parse
from models.resnet import ResNet

WEIGHTS = "weights.safetensors"
DESCRIPTION = "config.json"
CHECKPOINTS = ("last.pt", "previous.pt")
Color = Annotated[list[Finite], Field(min_length=3, max_length=3)]


@with_config(extra="allow")
class Network(TypedDict):
    """The arguments of `models.ResNet`; of its attention the ``name`` and the settings."""

    block: Text
    depths: list[Count]
    widths: list[Count]
    stem: Count
    shortcut: Text
    num_classes: Count
    image_size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    attention: dict[str, Any]


class Description(BaseModel, frozen=True):
    """What a file of weights is of; `model_dump` is what config.json holds.

    Attributes:
        format: `models.fields.FORMAT`.
        network: what `build` takes.
        class_names: a name for each logit.
        mean, std: of the training images, per channel, on a scale where white is 1.
        data: name of the data set.
        data_digest: which images those are, see `data.Dataset`; None if older code did not say.
        settings: all settings that decide the result of the run which has trained it.
        precision: in which it was trained, such as "float32".
        version: of the code that has written it.
        commit: likewise, or "unknown".
    """

    format: Format
    network: Network
    class_names: list[Text]
    mean: Color
    std: Annotated[list[Annotated[Finite, Field(gt=0)]], Field(min_length=3, max_length=3)]
    data: Text
    data_digest: Text | None = None
    settings: dict[str, Any]
    precision: Text
    version: Text
    commit: Text

    @model_validator(mode="after")
    def _one_name_for_each_logit(self) -> "Description":
        names, logits = len(self.class_names), self.network["num_classes"]
        if names != logits:
            raise ValueError(f"{names} class_names for network.num_classes={logits}")
        return self


@dataclass(frozen=True)
class Trained:
    """A network with its weights, in evaluation mode, and what it needs to be used."""

    network: ResNet
    description: Description

    @property
    def class_names(self) -> list[str]:
        """A name for each logit."""
        return self.description.class_names

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that it was trained on."""
        height, width = self.description.network["image_size"]
        return height, width


def build(network: Network) -> ResNet:
    """The network of a description, with new weights.

    Raises:
        ValueError: there is no such network; see `models.ResNet`.
    """
    arguments: dict[str, Any] = {**network}
    attention = dict(arguments.pop("attention"))
    name = attention.pop("name")
    if name not in ATTENTIONS:
        raise ValueError(f"attention={name} is not one of {', '.join(ATTENTIONS)}")
    return ResNet(**arguments, attention=ATTENTIONS[name](**attention))


def describe(network: ResNet) -> Network:
    """The arguments of ``network`` as plain values, as `build` takes them."""
    arguments = network.arguments
    return cast(Network, arguments | {"attention": describe_attention(arguments["attention"])})


def describe_attention(attention: Attention) -> dict[str, Any]:
    """``attention`` as a dict of its name and its settings."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(attention).items()}
    return {"name": attention.name, **settings}


def weights_as_bytes(model: nn.Module) -> bytes:
    """The parameters and buffers of ``model`` as a file of the safetensors format."""
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()})


def description_as_text(description: Description) -> str:
    """``description`` as the text of config.json."""
    return json.dumps(description.model_dump(), indent=1, allow_nan=False) + "\n"


# ---- Loading ------------------------------------------------------------------------------------


def load(path: str | Path, device: torch.device | str = "cpu") -> Trained:
    """A trained network, rebuilt from its file alone; no code of the file is run.

    Args:
        path: a run's folder, a ``weights.safetensors`` with its ``config.json`` beside it, or a
            checkpoint. Of a folder the weights are taken, or the newest checkpoint of a run that is
            not finished. Of a checkpoint with averaged weights these are taken, whose scores are
            the run's.
        device: where the network is put.

    Returns:
        The network in evaluation mode with its description; see `Trained`.

    Raises:
        ValueError: there is no such file, it is damaged, or its weights and its description do not
            fit; one line that names the file and what does not fit.
    """
    file = _file(Path(path).expanduser())
    read = _read_weights if file.suffix == ".safetensors" else _read_checkpoint
    tensors, described, where = read(file)
    description = parse(Description, described, where)
    network = _with_weights(description, tensors, where, file)
    return Trained(network.to(device).eval(), description)


def _file(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"there is no {path}")
    if path.is_dir():
        for name in (WEIGHTS, *CHECKPOINTS):
            if (path / name).is_file():
                return path / name
        raise ValueError(f"{path} has no {WEIGHTS} and no {CHECKPOINTS[0]}")
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path} is neither a .safetensors file nor a checkpoint (.pt)")
    return path


def _read_weights(file: Path) -> tuple[dict[str, Tensor], Any, str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    beside = file.with_name(DESCRIPTION)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {one_line(error)}") from error
    try:
        described = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{beside} is missing, which describes {file.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{beside} is damaged: {one_line(error)}") from error
    return tensors, described, str(beside)


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], Any, str]:
    try:
        # torch.load does not look at the checksums that torch.save writes.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's are of many types
        raise ValueError(f"{file} is damaged: {one_line(error).partition('. ')[0]}") from error
    if not isinstance(state, dict) or "description" not in state or "model" not in state:
        raise ValueError(f"{file} does not say what network it is of: older code has written it")
    if "ema_model" in state:
        averaged = state["ema_model"]
        return (
            {k.removeprefix("module."): v for k, v in averaged.items() if k.startswith("module.")},
            state["description"],
            str(file),
        )
    return state["model"], state["description"], str(file)


def _with_weights(
    description: Description, tensors: Mapping[str, Tensor], where: str, file: Path
) -> ResNet:
    """The network that is described, with ``tensors``.

    Raises:
        ValueError: they do not fit, or no network is described.
    """
    depths = description.network["depths"]
    try:
        if sum(depths) > len(tensors):
            raise ValueError(f"depths={depths} are more blocks than there are weights")
        with torch.device("meta"):  # nothing is allocated before all is known to fit
            network = build(description.network)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{where} describes no network: {one_line(error)}") from error
    own = network.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{file}: missing key {name} of the network in {where}")
        if name not in own:
            raise ValueError(f"{file}: unexpected key {name}, not in the network of {where}")
        given, expected = tuple(tensors[name].shape), tuple(own[name].shape)
        if given != expected:
            raise ValueError(f"{file}: {name} is {given}, and {expected} by {where}")
    # In memory of their own, aligned as torch does it, and not in channels_last as a checkpoint's
    # may be: the same weights then round in the same way.
    own_memory = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    network.load_state_dict(own_memory, assign=True)
    return network
