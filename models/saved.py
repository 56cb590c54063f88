"""Trained networks in self-describing files: saved by a run, rebuilt without anything else.

A finished run leaves two files in its folder: ``weights.safetensors``, which other tools can open,
and ``config.json``, which describes the network, its class names and the normalization of its
images. A checkpoint, ``last.pt``, contains the same. Loading never runs code from a file: weights
are read as tensors, and the description as plain values.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator, BaseModel, Field, model_validator, with_config
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from aaconv.text import one_line
from models.attention import ATTENTIONS, Attention
from models.fields import (
    Count,
    Finite,
    Format,
    Plain,
    Side,
    Text,
    UnreadableError,
    parse,
    read_json,
    short_value,
)
from models.foreign import ForeignWeights, find_foreign
from models.resnet import ResNet
from models.weight_files import check_tensors, named_tensors, read_safetensors, read_torch

WEIGHTS = "weights.safetensors"
DESCRIPTION = "config.json"
CHECKPOINTS = ("last.pt", "previous.pt")
# Mean and standard deviation of pixels, on a scale where white is 1.
Mean = Annotated[Finite, Field(ge=0, le=1)]
Deviation = Annotated[Finite, Field(gt=1e-12, le=1)]


@with_config(extra="allow")
class Network(TypedDict):
    """The arguments of `models.ResNet`, with attention as its ``name`` and settings."""

    block: Text
    depths: list[Count]
    widths: list[Count]
    stem: Count
    shortcut: Text
    # Files from older versions lack these.
    strided_stem: NotRequired[bool]
    drop_path: NotRequired[Finite]
    dropout: NotRequired[Finite]
    num_classes: Count
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    attention: dict[str, Any]


def _is_of_data(settings: dict[str, Any]) -> dict[str, Any]:
    data = settings.get("data", {})
    if not isinstance(data, dict):
        raise ValueError(f".data is {short_value(data)}, not the settings of a data set")
    return settings


class Description(BaseModel, frozen=True):
    """The description of a trained network; `model_dump` gives the content of config.json.

    Attributes:
        format: `models.fields.FORMAT`.
        network: the argument of `build`.
        class_names: a name for each logit.
        mean, std: statistics of the training images, per channel, on a scale where white is 1.
        data: name of the data set.
        data_digest: digest that identifies its images, see `data.Dataset`.
        settings: all settings that affect the result of the training run.
        precision: precision of training, such as "float32".
        version: version of the code that wrote the file.
        commit: commit of that code, or "unknown".
    """

    format: Format
    network: Network
    class_names: list[Text]
    mean: Annotated[list[Mean], Field(min_length=3, max_length=3)]
    std: Annotated[list[Deviation], Field(min_length=3, max_length=3)]
    data: Text
    data_digest: Text
    settings: Annotated[Plain, AfterValidator(_is_of_data)]
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
    """A network with its weights, in evaluation mode, and its description."""

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
    """Build the described network, with new weights.

    The attention backend is "auto", whatever ``backend`` the network was trained with.

    Raises:
        ValueError: if the description is invalid; see `models.ResNet`.
    """
    arguments: dict[str, Any] = {**network}
    attention = dict(arguments.pop("attention"))
    name = attention.pop("name")
    if name not in ATTENTIONS:
        raise ValueError(f"attention={name} is not one of {', '.join(ATTENTIONS)}")
    if "backend" in attention:
        attention["backend"] = "auto"
    return ResNet(**arguments, attention=ATTENTIONS[name](**attention))


def describe(network: ResNet) -> Network:
    """Return the arguments of ``network`` as plain values, in the form that `build` accepts."""
    arguments = network.arguments
    return cast(Network, arguments | {"attention": describe_attention(arguments["attention"])})


def describe_attention(attention: Attention) -> dict[str, Any]:
    """Return ``attention`` as a dict of its name and settings."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(attention).items()}
    return {"name": attention.name, **settings}


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return ``tensors``, keyed by name, as the bytes of a safetensors file."""
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def description_as_text(description: Description) -> str:
    """Return ``description`` as the text of config.json."""
    return json.dumps(description.model_dump(), indent=1, allow_nan=False) + "\n"


# ---- Loading ------------------------------------------------------------------------------------


def load(path: str | Path, device: torch.device | str = "cpu") -> Trained:
    """Load a trained network, rebuilt from its file alone, without running any code from it.

    Args:
        path: a run's folder, a ``weights.safetensors`` with its ``config.json`` in the same folder,
            or a checkpoint. In a folder, the weights are used, or the newest checkpoint if the run
            is not finished. From a checkpoint with averaged weights, those are loaded, because the
            run reports their scores.
        device: device of the network.

    Returns:
        The network in evaluation mode with its description; see `Trained`.

    Raises:
        ValueError: if there is no such file, it is damaged, or its weights do not match its
            description; one line that names the file and the mismatch.
    """
    found = load_weights(path)
    if isinstance(found, ForeignWeights):
        raise UnreadableError(
            f"{found.file} holds weights of a ResNet of torchvision or timm; train from them "
            "with train.py init_from=..., then use that run's network here"
        )
    return replace(found, network=found.network.to(device))


def load_weights(path: str | Path) -> Trained | ForeignWeights:
    """Load a file like `load`, on the CPU, or return its weights if it is from another library.

    Raises:
        UnreadableError: see `load`.
    """
    file = described_in = _file(Path(os.path.expanduser(path)))
    description = None
    if file.suffix == ".safetensors":
        described_in = file.with_name(DESCRIPTION)
        description = read_json(described_in) if described_in.exists() else None
        tensors: Any = read_safetensors(file)
    else:
        tensors = read_torch(file)
        if isinstance(tensors, dict) and tensors.keys() >= {"description", "model"}:
            description, tensors = tensors["description"], _evaluated_weights(tensors, file)
    foreign = find_foreign(tensors, file)
    if foreign is not None:
        return foreign
    if description is None and described_in != file:
        raise UnreadableError(f"{described_in}, which describes {file.name}, is missing")
    if description is None:
        raise UnreadableError(
            f"{file} does not describe its network: it is not a checkpoint of train.py, or "
            "an older version wrote it"
        )
    described = parse(Description, description, f"{described_in}")
    tensors = named_tensors(tensors, f"{file}: model")
    return Trained(_with_weights(described, described_in, tensors, file).eval(), described)


def _evaluated_weights(state: dict[str, Any], file: Path) -> Any:
    """Return the averaged weights of a checkpoint if it has any, otherwise its plain weights."""
    if "ema_model" not in state:
        return state["model"]
    averaged = named_tensors(state["ema_model"], f"{file}: ema_model")
    prefix = "module."
    return {k.removeprefix(prefix): v for k, v in averaged.items() if k.startswith(prefix)}


def _file(path: Path) -> Path:
    if not path.exists():
        raise UnreadableError(f"there is no {path}")
    if path.is_dir():
        for name in (WEIGHTS, *CHECKPOINTS):
            if (path / name).is_file():
                return path / name
        raise UnreadableError(f"{path} has no {WEIGHTS} and no {CHECKPOINTS[0]}")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UnreadableError(f"{path} is neither a .safetensors file nor a checkpoint (.pt)")
    return path


def _with_weights(
    description: Description, described_in: Path, tensors: dict[str, Tensor], file: Path
) -> ResNet:
    """Return the described network with ``tensors``, the weights from ``file``.

    Raises:
        UnreadableError: if they do not match, or the description is invalid.
    """
    depths = description.network["depths"]
    try:
        if sum(depths) > len(tensors):
            raise ValueError(f"depths={depths} are more blocks than there are weights")
        with torch.device("meta"):  # allocate nothing until everything is known to match
            network = build(description.network)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        line = f"{described_in} does not describe a valid network: {one_line(error)}"
        raise UnreadableError(line) from error
    of_network = f"the network of {described_in}"
    check_tensors(tensors, network.state_dict(), f"{file}", of_network)
    # Clone into torch's own aligned memory and, since a checkpoint may be in channels_last, to the
    # contiguous format, so that the same weights give the same rounding.
    own_memory = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    network.load_state_dict(own_memory, assign=True)
    return network
