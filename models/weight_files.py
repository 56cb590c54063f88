"""Read tensors from files without running code from them, and check them before use."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aaconv.text import one_line
from models.fields import UnreadableError, check_is_file, short_value

# Dtypes of weights and statistics in any network; a count of batches is an integer.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTER = "num_batches_tracked"


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UnreadableError: if it is damaged or not a regular file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_is_file(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UnreadableError(f"{file} is damaged: {one_line(error)}") from error


def read_torch(file: Path) -> Any:
    """Return what `torch.save` wrote to a file: tensors, on the CPU, and plain values.

    Raises:
        UnreadableError: if it is damaged, not a regular file, or contains anything else.
    """
    check_is_file(file)
    try:
        with file.open("rb") as opened:
            start = opened.read(2)
        if start == b"PK":
            # torch.load does not verify the checksums that torch.save writes.
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"wrong checksum of {damaged}")
        elif start != b"\x80\x02":  # start of files from before torch.save wrote archives
            raise ValueError("it was not written by torch.save")
        with warnings.catch_warnings():  # about tensor types that no network here uses
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if foreign is not None and isinstance(error, pickle.UnpicklingError):
            raise UnreadableError(
                f"{file} holds {foreign[1]}, which only its own code can read; save the network's "
                "state_dict() alone"
            ) from None
        raise UnreadableError(f"{file} is damaged: {one_line(error).partition('. ')[0]}") from error


def named_tensors(value: Any, where: str) -> dict[str, Tensor]:
    """Return ``value`` if it is a dict keyed by names; `tensor_fault` checks the tensors in it.

    Raises:
        UnreadableError: if it is not.
    """
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UnreadableError(f"{where} is {short_value(value)}, not tensors by their names")
    return value


def check_tensors(
    tensors: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    where: str,
    network: str,
    finite: bool = True,
) -> None:
    """Check ``tensors`` from ``where`` against the ``expected`` ones; ``network`` is for messages.

    Raises:
        UnreadableError: if names, shapes or dtypes differ, or `tensor_fault` finds a fault; one
            line that names the tensor.
    """
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UnreadableError(f"{where}: missing key {name} of {network}")
        if name not in expected:
            raise UnreadableError(f"{where}: unexpected key {name}, not in {network}")
        value, own = tensors[name], expected[name]
        if isinstance(value, Tensor) and value.shape != own.shape:
            shapes = f"has shape {tuple(value.shape)}; {network} has {tuple(own.shape)}"
            raise UnreadableError(f"{where}: {name} {shapes}")
        if isinstance(value, Tensor) and value.dtype != own.dtype:
            raise UnreadableError(f"{where}: {name} is {value.dtype}; {network} has {own.dtype}")
        fault = tensor_fault(name, value, finite)
        if fault is not None:
            raise UnreadableError(f"{where}: {name} {fault}")


def tensor_fault(name: str, value: Any, finite: bool = True) -> str | None:
    """Return what is wrong with this weight or statistic, or None; its shape is not checked."""
    if not isinstance(value, Tensor):
        return f"is {short_value(value)}, not a tensor"
    if value.layout != torch.strided or value.device.type != "cpu":
        return f"is not a dense CPU tensor ({value.layout}, {value.device})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has shape {tuple(value.shape)}, but the file holds fewer values"
    if finite and value.dtype in FLOATS and not value.float().isfinite().all():
        return "has values that are not finite in float32"
    if finite and name.endswith("running_var") and (value < 0).any():
        return "has variances below 0"
    return None
