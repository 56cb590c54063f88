"""Copy matching weights from one network to another, and list those that were not copied."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aaconv import AugmentedConv, text
from aaconv.maps import augmented_layers
from aaconv.tables import fit_table
from models.foreign import ForeignWeights
from models.saved import Trained

# Settings that determine the meaning of attention's tensors.
DECISIVE = ("dk", "dv", "Nh", "qk_norm", "absolute")
# Tensors of an augmented convolution that are meaningful only with equal DECISIVE settings.
ATTENTIONS_OWN = ("qkv_conv", "attn_out", "key_rel_h", "key_rel_w")
TABLES = ("key_rel_h", "key_rel_w")
CONVOLUTION = "conv_out"  # in an augmented convolution; in a plain network, the module itself


@dataclass(frozen=True)
class Row:
    """A tensor that was not copied unchanged.

    Attributes:
        module: its module, where an augmented convolution counts as one module.
        tensor: its name in the module.
        why: what was copied instead, or why nothing was.
    """

    module: str
    tensor: str
    why: str


@dataclass(frozen=True)
class Transfer:
    """The result of `transfer`.

    Attributes:
        taken: number of parameters copied from the other network.
        of: total number of parameters.
        rows: the tensors that were not copied unchanged, in the network's order, followed by those
            of the other network that do not exist in this one.
    """

    taken: int
    of: int
    rows: list[Row]

    def table(self) -> list[str]:
        """Return one line per module in ``rows``, its tensors grouped by reason."""
        lines: list[tuple[str, str]] = []
        for module in dict.fromkeys(row.module for row in self.rows):
            reasons: dict[str, list[str]] = {}
            for row in self.rows:
                if row.module == module:
                    reasons.setdefault(row.why, []).append(row.tensor)
            said = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
            lines.append((module, "; ".join(said)))
        return text.table(lines, "ll")


def transfer(
    network: nn.Module, other: Trained | ForeignWeights, class_names: Sequence[str]
) -> Transfer:
    """Copy the matching weights of ``other`` to ``network``, whose classes are ``class_names``.

    Copied, by name, are

    - tensors of the same shape; attention's own only if dk, dv, Nh, qk_norm and absolute positions
      are the same;
    - relative tables for another map size, converted by `aaconv.tables.fit_table`;
    - if one network is augmented and the other is plain, or dv differs, the first output channels
      of the convolution, as many as both have;
    - the last layer, if the classes are known to be the same.

    Everything else keeps its initialization.

    Raises:
        ValueError: if no convolution weight is copied, not even in part.
    """
    if isinstance(other, Trained):
        theirs, there = dict(other.network.state_dict()), augmented_layers(other.network)
        known_classes = other.class_names == list(class_names)
    else:
        theirs, there, known_classes = other.tensors, {}, False
    here = augmented_layers(network)
    parameters = dict(network.named_parameters())
    rows, used, taken, fits = [], set(), 0, False
    for name, tensor in network.state_dict().items():
        module, own = _place(name, here)
        source = _source(name, module, own, theirs)
        used.add(source)
        if source is None:
            value, why = None, "newly initialized"
        elif module == "head" and not known_classes:
            value, why = (
                None,
                f"newly initialized: the source has {len(theirs[source])} other classes",
            )
        elif module in there and own.partition(".")[0] in ATTENTIONS_OWN:
            value, why = _of_attention(tensor, theirs[source], own, here[module], there[module])
        else:
            augmented = module in here or module in there
            value, why = _of_convolution(tensor, theirs[source], augmented)
        if why:
            rows.append(Row(module, own, why))
        if value is not None:
            with torch.no_grad():
                (tensor[: len(value)] if value.dim() else tensor).copy_(value)
            taken += value.numel() if name in parameters else 0
            fits = fits or value.dim() == 4
    if not fits:
        raise ValueError(
            "none of its convolutions fits this network; choose the model that it was trained with"
        )
    for name in theirs:
        if name not in used:
            rows.append(Row(*_place(name, there), "not in this network"))
    return Transfer(taken, sum(p.numel() for p in network.parameters()), rows)


def _place(name: str, layers: Iterable[str]) -> tuple[str, str]:
    """Return a tensor's module, an augmented convolution counting as one, and its name there."""
    for layer in layers:
        if name.startswith(f"{layer}."):
            return layer, name.removeprefix(f"{layer}.")
    module, _, own = name.rpartition(".")
    return module, own


def _source(name: str, module: str, own: str, theirs: dict[str, Tensor]) -> str | None:
    """Return the tensor's name in the other network, or None; either may be augmented or plain."""
    if name in theirs:
        return name
    first, _, rest = own.partition(".")
    other = f"{module}.{rest}" if first == CONVOLUTION else f"{module}.{CONVOLUTION}.{own}"
    return other if other in theirs else None


def _of_attention(
    tensor: Tensor, value: Tensor, own: str, here: AugmentedConv, there: AugmentedConv
) -> tuple[Tensor | None, str]:
    """Return what to copy from ``value``, an attention tensor, and what is not copied unchanged."""
    pairs = {key: (getattr(here, key), getattr(there, key)) for key in DECISIVE}
    differing = [f"{key}={theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs]
    if differing:
        return None, f"newly initialized ({', '.join(differing)} in the source)"
    if own in TABLES and len(value) != len(tensor):
        fitted = fit_table(value, (len(tensor) + 1) // 2)
        return fitted, f"fitted from {len(value)} to {len(tensor)} rows"
    if value.shape != tensor.shape:
        return None, f"newly initialized ({_shape(value)} in the source)"
    return value, ""


def _of_convolution(tensor: Tensor, value: Tensor, augmented: bool) -> tuple[Tensor | None, str]:
    """Do the same for other tensors; only an ``augmented`` convolution's are copied in part."""
    if value.shape == tensor.shape:
        return value, ""
    if not augmented or value.shape[1:] != tensor.shape[1:]:
        return None, f"newly initialized ({_shape(value)} in the source)"
    if len(value) < len(tensor):
        return value, f"copied {len(value)} of {len(tensor)} channels, the rest newly initialized"
    return value[: len(tensor)], f"the first {len(tensor)} of {len(value)} channels"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


# ---- Freezing -----------------------------------------------------------------------------------


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Freeze the parameters of the modules with these ``names``, including all submodules.

    Raises:
        ValueError: if a name is not a module with parameters, or nothing is left to train.
    """
    for name in names:
        frozen = list(_module(network, name).parameters())
        if not frozen:
            raise ValueError(f"freeze={name}: that module has no parameters")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"freeze=[{','.join(names)}] leaves nothing to train")


def set_frozen_eval(network: nn.Module, names: Sequence[str]) -> None:
    """Put the frozen modules of a network into evaluation mode during training.

    Batch normalization there then keeps its statistics, which are learned just like its weights.
    """
    for name in names:
        network.get_submodule(name).eval()


def _module(network: nn.Module, name: str) -> nn.Module:
    modules = dict(network.named_modules())
    if not name or name not in modules:
        parent = name.rpartition(".")[0]
        inside = modules.get(parent, network)
        where = parent if parent in modules and parent else "the network"
        children = [child for child, _ in inside.named_children()] or [parent]
        raise ValueError(
            f"freeze={name} is not a module of {where}; choose from {', '.join(children)}"
        )
    return modules[name]
