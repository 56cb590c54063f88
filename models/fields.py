"""Types of the values in a run's files, and the one line that names a value of another type."""

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, InstanceOf, TypeAdapter, ValidationError

from aaconv.text import one_line

T = TypeVar("T")
# To make one takes longer than most checks.
_adapter: Any = cache(TypeAdapter)

# Of everything in a run's folder. A change of names or meanings raises it.
FORMAT = 3
# A little beyond float32's range: nothing that a run measures is larger, so that sums and squares
# of what is read stay finite.
MAX_NUMBER = 3.5e38
MAX_DEPTH = 20  # of values inside each other


class UnreadableError(ValueError):
    """A file of a run is damaged or of another format; the message is one line that says how."""


def _this_format(value: int) -> int:
    if value != FORMAT:
        raise ValueError(f" is {value}; this version reads format {FORMAT}")
    return value


Format = Annotated[int, Field(strict=True), AfterValidator(_this_format)]
# At least 0, and at least 1.
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**64)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**64)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-MAX_NUMBER, le=MAX_NUMBER)]
# Of images, in pixels; the setting data.size allows the same.
Side = Annotated[Count, Field(le=1024)]
# Not pydantic's str: names of folders, and so of classes, may hold bytes that are no UTF-8.
Text = Annotated[InstanceOf[str], Field(min_length=1)]


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a number of at most float32's range, neither NaN nor infinite."""
    return is_number(value) and -MAX_NUMBER <= value <= MAX_NUMBER


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_plain(values: Any, key: str = "", depth: int = 0) -> Any:
    """``values``, if JSON can hold them, its numbers are finite and it is not nested deeply."""
    key = key.encode(errors="backslashreplace").decode()  # pydantic asks for UTF-8
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


# Settings, for example.
Plain = Annotated[dict[str, Any], AfterValidator(are_plain)]


def parse(kind: type[T], value: Any, where: str) -> T:
    """``value``, which a file holds, as a ``kind``: a pydantic model, a dataclass or a TypedDict.

    Raises:
        UnreadableError: it is none; one line of ``where``, the first key at fault, and the fault.
            What a validator of the type raises follows the key directly.
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
    """For a message. JSON's own words for what JSON holds: null and not None."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError, TypeError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---- Files --------------------------------------------------------------------------------------


def check_is_file(path: Path) -> None:
    """Raise UnreadableError for what is there and no regular file: a pipe would wait forever."""
    if path.exists() and not path.is_file():
        raise UnreadableError(f"{path} is not a file")


def read_text(path: Path) -> str:
    """The text of a run's file.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it cannot be read, or is no UTF-8.
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
    """The value of a run's JSON file; raises as `read_text` does."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is damaged: {one_line(error)}") from None
