"""Add attention to an existing network by replacing its convolutions in place."""

import copy
import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from aaconv.checks import MAX_SIZE, whole
from aaconv.maps import augmented_layers
from aaconv.modules import AugmentedConv, check_init
from aaconv.ratios import channels, check_amount
from aaconv.text import one_line, table

# The paper pools 28x28 maps, but no smaller ones (section 4.2).
POOLED_ABOVE = 400
# Wrappers keep references to the modules they were given, so replacing those has no effect.
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")

Filter = Callable[[nn.Module, str], bool]
Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Row:
    """One convolution and what was done with it."""

    name: str
    out: int  # output channels
    map: Size | None  # (H, W) of its output; None if it has none or several
    layer: AugmentedConv | None  # the new layer; None if the convolution was not replaced
    skip_reason: str = ""


@dataclass(frozen=True)
class Report:
    """The result of `augment_`; as a string, a table of all convolutions."""

    rows: Sequence[Row]

    @property
    def augmented(self) -> list[str]:
        """The names of the augmented layers."""
        return [row.name for row in self.rows if row.layer is not None]

    def __str__(self) -> str:
        lines = [["convolution", "map", "out", "dk", "dv", "Nh", "pool", ""]]
        for row in self.rows:
            layer = row.layer
            amounts = [layer.dk, layer.dv, layer.Nh, layer.pool] if layer else [""] * 4
            size = "" if row.map is None else f"{row.map[0]}x{row.map[1]}"
            lines.append([row.name, size, *map(str, [row.out, *amounts]), row.skip_reason])
        count = f"{len(self.augmented)} of {len(self.rows)} convolutions are augmented"
        return "\n".join([*table(lines, "lrrrrrrl"), count])


def augment_(
    model: nn.Module,
    example_input: Any,
    *,
    dk: int | float = 0.2,
    dv: int | float = 0.1,
    Nh: int = 8,
    min_dkh: int = 20,
    filter_fn: Filter | None = None,
    max_positions: int = 784,
    relative: bool = True,
    pool: int | None = None,
    init: str = "torch",
    qk_norm: bool = False,
    keep_weights: bool = True,
) -> Report:
    """Replace convolutions of ``model`` with `AugmentedConv`, in place.

    By default, this replaces the ungrouped convolutions with an odd kernel larger than 1x1 whose
    output has at most ``max_positions`` positions, and more than one after pooling. For 224x224
    images, these are all 3x3 convolutions of ResNet-50 except those of the first stage, as in
    Bello et al. 2019, section 4.2; dk, dv, Nh, min_dkh and pool default to its values. Map sizes
    are found by running a copy in evaluation mode on fake tensors, which computes nothing.

    All replacements are prepared before the first one is made, so an error leaves the model
    unchanged. A new layer has the device, dtype and training flag of the old one, and a bias if the
    old one had a bias. Its plain convolution has the old one's requires_grad and, with
    ``keep_weights``, the old weights of the first ``out - dv`` channels. Attention is new and
    trainable and replaces the last dv channels, so the network needs more training. Create the
    optimizer afterward: an existing one does not know the new parameters. The model's
    ``no_weight_decay()``, which timm's optimizers call, then also returns the relative tables.
    `attention_stats` shows how soft the attention of the new layers is.

    Args:
        model: any network of torch modules, neither compiled nor wrapped for several devices; do
            that afterward.
        example_input: what ``model`` is called with: a tensor, a tuple of arguments or a dict of
            keyword arguments. The relative tables are made for the map sizes it gives.
        dk: key channels, as a number (int) or as a fraction of the output channels (float), which
            is rounded to a multiple of Nh.
        dv: value channels, specified like ``dk``.
        Nh: number of heads.
        min_dkh: minimum key channels per head if ``dk`` is a fraction.
        filter_fn: called with each convolution and its name; returns whether to replace it. Any
            map size and kernel is allowed then, but a choice that cannot be replaced is an error.
        max_positions: without ``filter_fn``, the largest map, height times width, whose
            convolutions are replaced. The cost of attention grows with its square.
        relative: learn relative positions.
        pool: ``pool`` of every `AugmentedConv`. By default, as in the paper, 2 on maps of more
            than POOLED_ABOVE positions, such as 28x28, and 1 on smaller ones.
        init: as in `AugmentedConv`.
        qk_norm: as in `AugmentedConv`.
        keep_weights: keep the first ``out - dv`` channels of the old convolution; otherwise all
            parameters are new.

    Returns:
        A printable report with one row per convolution, in module order, each with the new layer
        or the reason why the convolution was not replaced.

    Raises:
        ValueError: if the arguments contradict each other, the model is wrapped or compiled, its
            forward pass fails or depends on the values of the data, ``filter_fn`` chooses a
            convolution that cannot be replaced, or nothing can be replaced at all.
    """
    options = _Options(
        dk, dv, Nh, min_dkh, filter_fn, max_positions, relative, pool, init, qk_norm, keep_weights
    )
    _check_model(model)
    names = _convolution_names(model)
    sizes = _map_sizes(model, example_input)
    elsewhere = _used_elsewhere(model)
    rows = [
        _plan(convolution, own, sizes.get(own[0], []), options, elsewhere.get(convolution))
        for convolution, own in names.items()
    ]
    if not any(row.layer for row in rows):
        raise ValueError(f"nothing to augment: {_reasons(rows)}")
    for row, own in zip(rows, names.values(), strict=True):
        for name in own if row.layer is not None else ():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, row.layer)
    if not isinstance(getattr(model, "no_weight_decay", None), partial):  # augmented before
        inherited = getattr(model, "no_weight_decay", set)
        model.no_weight_decay = partial(_no_weight_decay, model, inherited)  # type: ignore[assignment]
    return Report(rows)


def _no_weight_decay(model: nn.Module, inherited: Callable[[], Iterable[str]]) -> set[str]:
    """Return the names from ``inherited`` and those of the relative tables of augmented layers."""
    tables = {
        f"{name}.{table}"
        for name, layer in augmented_layers(model).items()
        for table in layer.no_weight_decay()
    }
    return set(inherited()) | tables


def papers_pool(size: Size) -> int:
    """Return the paper's ``pool`` for a map of this size."""
    return 2 if size[0] * size[1] > POOLED_ABOVE else 1


@dataclass
class _Options:
    """The options of `augment_`, checked."""

    dk: int | float
    dv: int | float
    Nh: int
    min_dkh: int
    filter_fn: Filter | None
    max_positions: int
    relative: bool
    pool: int | None
    init: str
    qk_norm: bool
    keep_weights: bool

    def __post_init__(self) -> None:
        self.Nh = whole("Nh", self.Nh, MAX_SIZE, least=1)
        self.min_dkh = whole("min_dkh", self.min_dkh, MAX_SIZE, least=1)
        self.max_positions = whole("max_positions", self.max_positions, math.inf, least=1)
        if self.pool is not None:
            self.pool = whole("pool", self.pool, MAX_SIZE, least=1)
        self.dk, self.dv = _amount("dk", self.dk), _amount("dv", self.dv)
        if self.dv == 0:
            raise ValueError(f"dv={self.dv} must be greater than 0, or nothing is augmented")
        check_init(self.init)

    def pool_of(self, size: Size) -> int:
        """Return ``pool`` for a map of this size."""
        return papers_pool(size) if self.pool is None else self.pool


def _amount(name: str, value: Any) -> int | float:
    """Return ``value``, possibly a NumPy number, as an int or float that is valid as dk or dv."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an int or a float")
    amount = whole(name, value, MAX_SIZE) if isinstance(value, numbers.Integral) else float(value)
    check_amount(name, amount)
    return amount


# ---- The model ----------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, not {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"its module {name}" if name else "model"
        kinds = [kind.__name__ for kind in type(module).__mro__]
        for wrapper in WRAPPERS:
            if wrapper in kinds:
                raise ValueError(f"{where} is wrapped in {wrapper}; augment the network first")
        if "OptimizedModule" in kinds or module._compiled_call_impl is not None:
            raise ValueError(f"{where} is compiled; augment the network first")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a TorchScript program, whose modules cannot be replaced")
    if isinstance(model, nn.Conv2d):
        raise ValueError("model is itself a convolution; make an AugmentedConv instead")
    if not callable(getattr(model, "no_weight_decay", set)):
        raise ValueError("model.no_weight_decay must be a method, as timm's optimizers call it")


def _convolution_names(model: nn.Module) -> dict[nn.Conv2d, list[str]]:
    """Return the names of each convolution: several if the model uses it in several places."""
    modules = list(model.named_modules(remove_duplicate=False))
    augmented = [name for name, module in modules if isinstance(module, AugmentedConv)]
    inside = tuple(f"{name}." if name else "" for name in augmented)
    names: dict[nn.Conv2d, list[str]] = {}
    for name, module in modules:
        if isinstance(module, nn.Conv2d) and not name.startswith(inside):
            names.setdefault(module, []).append(name)
    return names


def _used_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules also used where a replacement would not take effect, with the reason."""
    owner: dict[Tensor, nn.Module] = {}
    elsewhere: dict[nn.Module, str] = {}
    for module in model.modules():
        for parameter in set(module.parameters(recurse=False)):
            if parameter in owner:
                elsewhere[module] = elsewhere[owner[parameter]] = (
                    "shares its weight with another module"
                )
            owner[parameter] = module
        for name, value in vars(module).items():
            if name == "_modules" or not isinstance(value, list | tuple | set | dict):
                continue
            for item in value.values() if isinstance(value, dict) else value:
                if isinstance(item, nn.Module):
                    elsewhere[item] = f"also in {name}, a {type(value).__name__} of its network"
    return elsewhere


def _map_sizes(model: nn.Module, example_input: Any) -> dict[str, list[tuple[Size, Size]]]:
    """Return the distinct (input, output) sizes of each convolution, keyed by its first name.

    Hooks are not called: they may need values, and fake tensors have none.

    Raises:
        ValueError: if the model cannot be copied, or its forward pass fails or depends on the
            values of the data.
    """
    args, kwargs = call_arguments(example_input)
    sizes: dict[str, list[tuple[Size, Size]]] = {}

    def note(name: str, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        call = (_size(x), _size(output))
        if call not in sizes.setdefault(name, []):
            sizes[name].append(call)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # A copy with fake tensors: whatever the forward pass stores does not end up in `model`.
    tensors = [*model.parameters(), *model.buffers()]
    attributes = (value for module in model.modules() for value in vars(module).values())
    tensors += [value for value in attributes if isinstance(value, Tensor)]
    try:
        fake = {id(t): mode.from_tensor(t if t.is_leaf else t.detach()) for t in tensors}
        shadow = copy.deepcopy(model, fake)
    except Exception as error:  # the model's own code may raise anything
        raise ValueError(f"model cannot be copied: {_told(error)}") from error
    try:
        with mode, torch.no_grad():
            for name, module in shadow.named_modules():
                module.training = False
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(partial(note, name), with_kwargs=True)
            args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            shadow(*args, **kwargs)
    except Exception as error:  # the model's own code may raise anything
        kind = type(error).__name__
        if kind.startswith(("DataDependent", "DynamicOutputShape", "GuardOnDataDependent")):
            raise ValueError(
                "model's forward pass depends on the values of the data, not on their shapes "
                "alone, so that its map sizes are unknown; augment the part that computes "
                f"features, such as a detector's backbone ({one_line(error)})"
            ) from error
        raise ValueError(f"model cannot be called with example_input: {_told(error)}") from error
    return sizes


def _size(x: Tensor) -> Size:
    return int(x.shape[-2]), int(x.shape[-1])


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def call_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that ``example_input`` means; see `augment_`."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, tuple | list):
        return tuple(example_input), {}
    return (example_input,), {}


# ---- The plan -----------------------------------------------------------------------------------


def _plan(
    convolution: nn.Conv2d,
    names: list[str],
    calls: list[tuple[Size, Size]],
    options: _Options,
    elsewhere: str | None,
) -> Row:
    """Build the replacement of one convolution, or find out why it is not replaced.

    Raises:
        ValueError: if ``filter_fn`` chooses the convolution but it cannot be replaced.
    """
    size = calls[0][1] if len({output for _, output in calls}) == 1 else None
    row = Row(names[0], convolution.out_channels, size, None)
    chooses = options.filter_fn
    if chooses is not None and not any(chooses(convolution, name) for name in names):
        return replace(row, skip_reason="not chosen by filter_fn")
    skip_reason = _obstacle(convolution, calls) or elsewhere
    if skip_reason is None:
        assert size is not None
        try:
            if chooses is None:
                _check_suitable(convolution, size, options)
            return replace(row, layer=_augmented(convolution, size, options))
        except ValueError as error:
            skip_reason = str(error)
    if chooses is not None:
        raise ValueError(f"filter_fn chooses {row.name}, which cannot be augmented: {skip_reason}")
    return replace(row, skip_reason=skip_reason)


def _obstacle(convolution: nn.Conv2d, calls: list[tuple[Size, Size]]) -> str | None:
    """Return why the convolution cannot be replaced, or None if it can."""
    if type(convolution) is not nn.Conv2d:
        return f"{type(convolution).__name__}, a subclass of Conv2d"
    if convolution.groups > 1:
        return f"groups={convolution.groups}"
    if convolution.padding_mode != "zeros":
        return f"padding_mode={convolution.padding_mode}"
    if _has_hooks(convolution):
        return "has hooks, which would be lost"
    if "forward" in vars(convolution):
        return "has a forward of its own"
    own = (convolution.weight, convolution.bias)
    if not all(isinstance(tensor, nn.Parameter) for tensor in own if tensor is not None):
        return "has a weight or bias that is no parameter"
    if not calls:
        return "never called"
    outputs = dict.fromkeys(output for _, output in calls)
    if len(outputs) > 1:
        several = ", ".join(f"{height}x{width}" for height, width in outputs)
        return f"called at several sizes: {several}"
    for (height, width), output in calls:
        down, right = convolution.stride
        attention = -(-height // down), -(-width // right)
        if output != attention:
            there = f"{height}x{width}, on which attention gives {attention[0]}x{attention[1]}"
            return f"{output[0]}x{output[1]} from {there}"
    return None


def _has_hooks(convolution: nn.Conv2d) -> bool:
    """Whether the module or one of its parameters has any hook."""
    hooks = [value for name, value in vars(convolution).items() if name.endswith("_hooks")]
    for parameter in convolution.parameters():
        hooks += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    return any(hooks)


def _check_suitable(convolution: nn.Conv2d, size: Size, options: _Options) -> None:
    """Raise ValueError for a convolution that is replaced only if ``filter_fn`` chooses it."""
    height, width = convolution.kernel_size
    positions = size[0] * size[1]
    extent = tuple(d * (k - 1) for d, k in zip(convolution.dilation, (height, width), strict=True))
    if height == width == 1:
        raise ValueError("kernel 1x1")
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"even kernel {height}x{width}")
    if convolution.padding != "same" and tuple(2 * p for p in convolution.padding) != extent:
        # On images of another size, attention would have more or fewer positions.
        raise ValueError(f"padding={convolution.padding} is not half of {extent}")
    if positions > options.max_positions:
        raise ValueError(f"{positions} positions, more than max_positions={options.max_positions}")
    if max(size) <= options.pool_of(size):
        raise ValueError("single position: nothing to attend to")


def _augmented(convolution: nn.Conv2d, size: Size, options: _Options) -> AugmentedConv:
    """Return the layer that replaces ``convolution``.

    Raises:
        ValueError: if the options do not fit its channels.
    """
    out = convolution.out_channels
    dk = channels(options.dk, out, options.Nh, options.min_dkh)
    dv = channels(options.dv, out, options.Nh)
    if isinstance(options.dv, float) and options.dv < 1 and dv >= out:
        raise ValueError(f"Nh={options.Nh} heads would take all of its {out} channels")
    layer = AugmentedConv(
        convolution.in_channels,
        out,
        convolution.kernel_size,  # type: ignore[arg-type]
        dk,
        dv,
        options.Nh,
        size,
        options.relative,
        convolution.stride,  # type: ignore[arg-type]
        padding=convolution.padding,  # type: ignore[arg-type]
        dilation=convolution.dilation,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
        pool=options.pool_of(size),
        init=options.init,
        qk_norm=options.qk_norm,
        device=convolution.weight.device,
        dtype=convolution.weight.dtype,
    )
    layer.train(convolution.training)
    kept = layer.conv_out
    if kept is None:
        return layer
    for name, old in convolution.named_parameters():
        new = kept.get_parameter(name)
        if options.keep_weights:
            with torch.no_grad():
                new.copy_(old[: kept.out_channels])
        new.requires_grad_(old.requires_grad)
    return layer


def _reasons(rows: Sequence[Row]) -> str:
    """Return why no convolution was replaced: each reason once, with its count."""
    if not rows:
        return "model has no Conv2d"
    counts = Counter(re.sub(r"^groups=.*", "grouped", row.skip_reason) for row in rows)
    return "; ".join(f"{count} of {len(rows)}: {why}" for why, count in counts.items())
