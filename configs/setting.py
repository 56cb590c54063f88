"""A setting's meaning and range, as metadata of its field in `configs.schema`."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

# Of any number: what an optimizer makes of it, lr / (1 - beta) for example, still is a float32.
MAX_FLOAT = 1e30
# What a value has to be to each of the bounds of a `Range`.
BOUNDS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


@dataclass(frozen=True)
class Range:
    """The values that a setting may have; of a list, that each of its values may have.

    Whatever the bounds, a number is finite and not beyond `MAX_FLOAT`.

    Attributes:
        at_least, at_most: bounds that are allowed themselves.
        above, below: bounds that are not.
        length: of a list.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    length: int | None = None

    def words(self) -> str:
        """The range as a sentence goes on after "must be"; empty where all is allowed."""
        parts = [f"{name.replace('_', ' ')} {_number(bound)}" for name, bound in self._bounds()]
        text = " and ".join(parts)
        return text if self.length is None else f"{self.length} numbers, each {text}"

    def allows(self, value: Any) -> bool:
        """Whether ``value``, a number or a list of numbers, is in the range; null always is."""
        if value is None or self == Range():
            return True
        if isinstance(value, Mapping):
            return False
        if isinstance(value, Iterable) and not isinstance(value, str):
            values = list(value)
            return self.length in (None, len(values)) and all(map(self.allows, values))
        if not isinstance(value, (int, float)):
            return True
        within = all(BOUNDS[name](value, bound) for name, bound in self._bounds())
        return within and abs(value) <= MAX_FLOAT

    def _bounds(self) -> list[tuple[str, float]]:
        bounds = ((name, getattr(self, name)) for name in BOUNDS)
        return [(name, bound) for name, bound in bounds if bound is not None]


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def setting(help: str, *, decides_result: bool = True, before: Any = MISSING, **bounds: Any) -> Any:
    """A field whose default the YAML files have.

    Args:
        help: what it means, its unit, and its range where the bounds cannot say it.
        decides_result: False for what names, locates, speeds up or reports a run and changes
            nothing in its result: no folder is named after it, a checkpoint can be continued with
            another value, and compare.py passes it on to every run.
        before: of a setting that was added later, the value that says what runs did before, whose
            files do not have it: with it they are alike.
        bounds: those of its `Range`.
    """
    metadata = {
        "help": help,
        "range": Range(**bounds),
        "decides_result": decides_result,
        "before": before,
    }
    return field(default=MISSING, metadata=metadata)
