"""Write docs/settings.md: every setting of train.py with its type, default and meaning.

    python scripts/settings.py            # after a change in configs/
    python scripts/settings.py --check    # exits with 2 and one line if the page is out of date

Types, meanings and ranges come from configs/schema.py and defaults from the YAML files, where
references to other settings are not resolved.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 2 if stale")


if __name__ == "__main__":
    start(__file__, options)

import dataclasses
import itertools
import json
import re
from enum import Enum
from typing import Any, NamedTuple, get_args, get_origin

from omegaconf import OmegaConf

from aaconv.text import markdown_table
from configs.schema import NO_EFFECT, OPTIONS, Config, fields_below
from training.compose import CONFIGS
from training.files import write_text
from training.variants import flatten

PAGE = CONFIGS.parent / "docs" / "settings.md"
COMMAND = "python scripts/settings.py"

INTRO = f"""# Settings

[README](../README.md) · [tutorial](tutorial.md) · [data](data.md) · [layer](layer.md) ·
[results](results.md) · [benchmarks](benchmarks.md) · [reliability](reliability.md)

<!-- Written by `{COMMAND}` from configs/schema.py and the YAML files in configs/. -->

`python train.py NAME=VALUE ...` sets any of these, `GROUP=OPTION` chooses an option of a group, and
`python train.py --cfg job` prints all values that a command would use. A default such as
`${{out_dir}}` takes the value of another setting. Those marked *no effect* change nothing in a
result: they do not name a run's folder, and a run can be continued with other values.
"""

# What each group is, in the order of the page.
GROUPS = {
    "model": "The network: the residual network that all comparisons share.",
    "attention": "What the network's blocks have in addition to convolutions.",
    "data": "The images it is trained and evaluated on.",
    "augmentation": "Random changes to the training images.",
    "optim": "The optimizer.",
    "schedule": "The learning rate over the steps of a run.",
    "tracking": "The dashboard. `metrics.csv` and `summary.json` are always written.",
}


class Row(NamedTuple):
    """What the page says about a setting, for all options that have it."""

    name: str
    type: str
    meaning: str

    @property
    def group(self) -> str:
        """The group whose options have it; for other settings, the first part of the name."""
        first = self.name.partition(".")[0]
        return "tracking" if first == "wandb" else first


def rows_of(kind: Any, prefix: str = "") -> list[Row]:
    """The settings of a config class, including nested ones, under their dotted names."""
    return [
        Row(name, type_in_words(field.type), meaning(name, field))
        for name, field in fields_below(kind, prefix)
    ]


def type_in_words(kind: Any) -> str:
    """``float | None`` is "float or null"; an enum is the list of its members."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(code(member.name) for member in kind)
    if kind is type(None):
        return "null"
    if kind is Any:
        return "see right"
    words = [type_in_words(part) for part in get_args(kind)]
    if not words:
        return str(kind.__name__)
    return f"list of {words[0]}" if get_origin(kind) is list else " or ".join(words)


def meaning(name: str, field: dataclasses.Field[Any]) -> str:
    """A setting's help, its range, and whether it changes a result."""
    words = [field.metadata["help"]]
    allowed = field.metadata["range"].words()
    if allowed:
        words.append(f"{allowed[0].upper()}{allowed[1:]}.")
    if name in NO_EFFECT:
        words.append("*No effect.*")
    return " ".join(words)


def load(path: Path, prefix: str = "") -> dict[str, Any]:
    """Return the unresolved values of a YAML file and of those next to it that it builds on.

    All dotted names start with ``prefix``.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    values: dict[str, Any] = {}
    for entry in content.pop("defaults", []):
        base = path.parent / f"{entry}.yaml"
        if base.is_file():
            values |= load(base, prefix)
    return values | flatten(content, prefix)


def option_files(group: str) -> list[Path]:
    """The YAML files of a group's options, resnet8 before resnet20."""

    def key(path: Path) -> list[Any]:
        return [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", path.stem)]

    return sorted((CONFIGS / group).glob("*.yaml"), key=key)


def read_option(path: Path) -> dict[Row, str]:
    """The settings of the option that this file defines, with their defaults."""
    group = path.parent.name
    schema = re.search(r"/schema/(\w+)/(\w+)@_here_", path.read_text(encoding="utf-8"))
    if schema:
        classes = {(there, name): kind for there, name, kind in OPTIONS}
        rows = rows_of(classes[schema[1], schema[2]], f"{group}.")
    else:  # its types are those of the fields of Config
        rows = [row for row in rows_of(Config) if row.group == group]
    # The files of tracking are for the whole configuration and have full names.
    values = load(path, "" if group == "tracking" else f"{group}.")
    return {row: in_yaml(values[row.name]) for row in rows}


def head_comment(path: Path) -> str:
    """The comment at the top of a YAML file, up to an empty line, a list or a command in it."""
    text = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
    lines = itertools.takewhile(re.compile("# (?! )").match, text.splitlines())
    return " ".join(line.removeprefix("# ") for line in lines)


def in_yaml(value: Any) -> str:
    """A value as it is written on the command line, formatted as code."""
    return code(value if isinstance(value, str) else json.dumps(value))


def section(group: str) -> str:
    """The section on a group: options, with defaults that differ between them, and settings."""
    own = {path: read_option(path) for path in option_files(group)}
    rows = list(dict.fromkeys(itertools.chain(*own.values())))
    having = {row: [path for path in own if row in own[path]] for row in rows}
    defaults = {row: {own[path][row] for path in having[row]} for row in rows}
    differing = [row for row in rows if len(defaults[row]) > 1]
    options = [
        [code(path.stem), head_comment(path), *(own[path].get(row, "") for row in differing)]
        for path in own
    ]
    config = (CONFIGS / "config.yaml").read_text(encoding="utf-8")
    (chosen,) = re.findall(rf"^  - {group}: (\w+)", config, re.MULTILINE)
    parts = [
        f"## {group}",
        f"{GROUPS[group]} The default is `{group}={chosen}`.",
        table(["option", "", *(code(row.name) for row in differing)], options),
    ]
    settings = [
        [
            code(row.name),
            "" if len(having[row]) == len(own) else ", ".join(code(p.stem) for p in having[row]),
            row.type,
            "see above" if row in differing else "".join(defaults[row]),
            row.meaning,
        ]
        for row in rows
    ]
    parts.append(table(["setting", "only with", "type", "default", "meaning"], settings))
    return "\n\n".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (head, *rows)]
    return "\n".join(markdown_table(escaped, "l" * len(head)))


def code(text: str) -> str:
    return f"`{text}`"


def run_section() -> str:
    """The settings that belong to no group."""
    values = load(CONFIGS / "config.yaml")
    rows = [
        [code(row.name), row.type, in_yaml(values[row.name]), row.meaning]
        for row in rows_of(Config)
        if row.group not in GROUPS
    ]
    text = "Settings of the run itself."
    return f"## run\n\n{text}\n\n{table(['setting', 'type', 'default', 'meaning'], rows)}"


def experiment_section() -> str:
    rows = [[code(path.stem), head_comment(path)] for path in option_files("experiment")]
    text = (
        "Whole recipes, which set several of the above at once; none by default. Each file in "
        "configs/experiment/ begins with its command, the hardware and the expected result."
    )
    return f"## experiment\n\n{text}\n\n{table(['option', ''], rows)}"


def page() -> str:
    """The text of docs/settings.md for the schema and the YAML files in `CONFIGS`."""
    parts = [INTRO.strip(), run_section(), *map(section, GROUPS), experiment_section()]
    return "\n\n".join(parts) + "\n"


@command(options)
def main(args: argparse.Namespace) -> None:
    text = page()
    if not args.check:
        write_text(PAGE, text)
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise ValueError(f"{PAGE.name} is out of date; run {COMMAND}")
