"""Trained networks as files that explain themselves: saved by a run, rebuilt from the file alone.

A run ends with two files side by side: ``weights.safetensors``, which other tools open too, and
``config.json``, which says what network the weights are of, what its classes are called and how its
images are normalized. A checkpoint, ``last.pt``, has the same inside. Loading runs no code of a
file: weights are read as tensors, and the description as plain values.
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
# Of pixels on a scale where white is 1.
Mean = Annotated[Finite, Field(ge=0, le=1)]
Deviation = Annotated[Finite, Field(gt=1e-12, le=1)]


@with_config(extra="allow")
class Network(TypedDict):
    """The arguments of `models.ResNet`; of its attention the ``name`` and the settings."""

    block: Text
    depths: list[Count]
    widths: list[Count]
    stem: Count
    shortcut: Text
    # Older code has none of these.
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
    """What a file of weights is of; `model_dump` is what config.json holds.

    Attributes:
        format: `models.fields.FORMAT`.
        network: what `build` takes.
        class_names: a name for each logit.
        mean, std: of the training images, per channel, on a scale where white is 1.
        data: name of the data set.
        data_digest: which images those are, see `data.Dataset`.
        settings: all settings that decide the result of the run which has trained it.
        precision: in which it was trained, such as "float32".
        version: of the code that has written it.
        commit: likewise, or "unknown".
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

    Its attention is computed as is best where it is now, whatever ``backend`` it was trained with.

    Raises:
        ValueError: there is no such network; see `models.ResNet`.
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
    """The arguments of ``network`` as plain values, as `build` takes them."""
    arguments = network.arguments
    return cast(Network, arguments | {"attention": describe_attention(arguments["attention"])})


def describe_attention(attention: Attention) -> dict[str, Any]:
    """``attention`` as a dict of its name and its settings."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(attention).items()}
    return {"name": attention.name, **settings}


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """``tensors``, by their names, as a file of the safetensors format."""
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


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
    found = load_weights(path)
    if isinstance(found, ForeignWeights):
        raise UnreadableError(
            f"{found.file} holds weights of a ResNet of torchvision's or timm's; train.py begins "
            "with them by init_from=..., and the network that it trains can be used here"
        )
    return replace(found, network=found.network.to(device))


def load_weights(path: str | Path) -> Trained | ForeignWeights:
    """What `load` makes of a file, on the CPU, or the weights of a published network in it.

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
            f"{file} does not say what network it is of: it is not a checkpoint of train.py, or "
            "an older version wrote it"
        )
    described = parse(Description, description, f"{described_in}")
    tensors = named_tensors(tensors, f"{file}: model")
    return Trained(_with_weights(described, described_in, tensors, file).eval(), described)


def _evaluated_weights(state: dict[str, Any], file: Path) -> Any:
    """Of a checkpoint the averaged weights, where there are some."""
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
    """The network that is described, with ``tensors``, which ``file`` holds.

    Raises:
        UnreadableError: they do not fit, or no network is described.
    """
    depths = description.network["depths"]
    try:
        if sum(depths) > len(tensors):
            raise ValueError(f"depths={depths} are more blocks than there are weights")
        with torch.device("meta"):  # nothing is allocated before all is known to fit
            network = build(description.network)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        line = f"{described_in} describes no network: {one_line(error)}"
        raise UnreadableError(line) from error
    of_network = f"the network of {described_in}"
    check_tensors(tensors, network.state_dict(), f"{file}", of_network)
    # In memory of their own, aligned as torch does it, and not in channels_last as a checkpoint's
    # may be: the same weights then round in the same way.
    own_memory = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    network.load_state_dict(own_memory, assign=True)
    return network
