"""Types of the values in a run's files, and the one line that names a value of another type."""

import json
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, InstanceOf, TypeAdapter, ValidationError

T = TypeVar("T")
# To make one takes longer than most checks.
_adapter: Any = cache(TypeAdapter)

# Of everything in a run's folder. A change of names or meanings raises it.
FORMAT = 3
# A little beyond float32's range: nothing that a run measures is larger, so that sums and squares
# of what is read stay finite.
MAX_NUMBER = 3.5e38


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
# Not pydantic's str: names of folders, and so of classes, may hold bytes that are no UTF-8.
Text = Annotated[InstanceOf[str], Field(min_length=1)]


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
        line = f"{key or 'it'} is {shortened(first['input'])}; {message[0].lower()}{message[1:]}"
    return " ".join(line.split())  # keys may have line breaks


def shortened(value: Any) -> str:
    """For a message. JSON's own words for what JSON holds: null and not None."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError, TypeError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
