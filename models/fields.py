"""Types of the values in a run's files, and one-line errors for values of another type."""

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, InstanceOf, TypeAdapter, ValidationError

from aaconv.text import one_line

T = TypeVar("T")
# Creating an adapter takes longer than most checks.
_adapter: Any = cache(TypeAdapter)

# Version of all files in a run's folder. Increase it when names or meanings change.
FORMAT = 3
# Slightly beyond float32's range: nothing that a run measures is larger, and sums and squares of
# values that are read stay finite.
MAX_NUMBER = 3.5e38
MAX_DEPTH = 20  # of nested values


class UnreadableError(ValueError):
    """A file of a run is damaged or has another format; the message says how, in one line."""


def _this_format(value: int) -> int:
    if value != FORMAT:
        raise ValueError(f" is {value}; this version reads format {FORMAT}")
    return value


Format = Annotated[int, Field(strict=True), AfterValidator(_this_format)]
# Integers of at least 0, and of at least 1.
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**64)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**64)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-MAX_NUMBER, le=MAX_NUMBER)]
# Height or width of images in pixels, with the same limit as the setting data.size.
Side = Annotated[Count, Field(le=1024)]
# Not pydantic's str: names of folders, and so of classes, may contain bytes that are not UTF-8.
Text = Annotated[InstanceOf[str], Field(min_length=1)]


def is_finite(value: Any) -> bool:
    """Return whether ``value`` is a number up to MAX_NUMBER in size, neither NaN nor infinite."""
    return is_number(value) and -MAX_NUMBER <= value <= MAX_NUMBER


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_plain(values: Any, key: str = "", depth: int = 0) -> Any:
    """Return ``values``; raise ValueError if they are not JSON, not finite or nested too deeply."""
    key = key.encode(errors="backslashreplace").decode()  # pydantic requires UTF-8
    if depth > MAX_DEPTH:
        raise ValueError(f"{key[:40]}... is nested too deeply")
    if is_number(values) and not is_finite(values):
        raise ValueError(f"{key} is {short_value(values)}, not a finite number")
    if isinstance(values, list):
        for index, inner in enumerate(values):
            are_plain(inner, f"{key}[{index}]", depth + 1)
    elif isinstance(values, dict):
        for name, inner in values.items():
            if not isinstance(name, str):
                raise ValueError(f"{key} has the key {short_value(name)}, which is not text")
            are_plain(inner, f"{key}.{name}", depth + 1)
    elif not (values is None or isinstance(values, str | int | float)):
        raise ValueError(f"{key} is {short_value(values)}, not a plain value")
    return values


# A dict of JSON values, such as settings.
Plain = Annotated[dict[str, Any], AfterValidator(are_plain)]


def parse(kind: type[T], value: Any, where: str) -> T:
    """Convert ``value`` from a file to a ``kind``: a pydantic model, a dataclass or a TypedDict.

    Raises:
        UnreadableError: if that fails; one line with ``where``, the first invalid key, and the
            reason. A message from a validator of the type follows the key directly.
    """
    try:
        parsed: T = _adapter(kind).validate_python(value)
        return parsed
    except ValidationError as error:
        raise UnreadableError(f"{where}: {_fault(error)}") from None


def _fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    key, message = "".join(parts).removeprefix("."), first["msg"]
    if first["type"] == "missing":
        line = f"{key} is missing"
    elif first["type"] == "value_error":
        line = f"{key}{first['ctx']['error']}"
    else:
        line = f"{key or 'it'} is {short_value(first['input'])}; {message[0].lower()}{message[1:]}"
    return " ".join(line.split())  # keys may have line breaks


def short_value(value: Any) -> str:
    """Format ``value`` briefly for a message, as JSON if possible: null instead of None."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError, TypeError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---- Files --------------------------------------------------------------------------------------


def check_is_file(path: Path) -> None:
    """Raise UnreadableError if ``path`` exists but is not a file: reading a pipe could hang."""
    if path.exists() and not path.is_file():
        raise UnreadableError(f"{path} is not a file")


def read_text(path: Path) -> str:
    """Return the text of a run's file.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableError: if it cannot be read or is not UTF-8.
    """
    try:
        check_is_file(path)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path} is damaged: {one_line(error)}") from None


def read_json(path: Path) -> Any:
    """Return the value of a run's JSON file; raise as `read_text` does, also if it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is damaged: {one_line(error)}") from None
