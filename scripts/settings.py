"""Write docs/settings.md: every setting of train.py with its type, default and meaning.

    python scripts/settings.py            # after a change in configs/
    python scripts/settings.py --check    # exits with 2 and one line if the page is out of date

Types, meanings and ranges are those of configs/schema.py; defaults are those of the YAML files,
before anything that refers to another setting is resolved.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, start


def options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")


if __name__ == "__main__":
    start(__file__, options)

import dataclasses
import re
from dataclasses import Field
from enum import Enum
from typing import Any, NamedTuple, get_args, get_origin

from omegaconf import OmegaConf

from aaconv.text import markdown_table
from configs.schema import NO_EFFECT, OPTIONS, Config, fields_below
from training.files import write_text
from training.variants import flatten

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "settings.md"
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

# What each group is, in the order of the page; a group's settings begin with the names after it.
GROUPS = {
    "model": (("model",), "The network: the residual network that all comparisons share."),
    "attention": (("attention",), "What the network's blocks have in addition to convolutions."),
    "data": (("data",), "The images it is trained and evaluated on."),
    "augmentation": (("augmentation",), "Random changes to the training images."),
    "optim": (("optim",), "The optimizer."),
    "schedule": (("schedule",), "The learning rate over the steps of a run."),
    "tracking": (
        ("wandb", "tracking"),
        "The dashboard. `metrics.csv` and `summary.json` are always written.",
    ),
}


class Row(NamedTuple):
    """What the page says of a setting, whichever options have it."""

    name: str
    type: str
    meaning: str


def rows_of(kind: Any, prefix: str) -> list[Row]:
    """The settings of a config class under their dotted names, those inside it included."""
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


def meaning(name: str, field: Field[Any]) -> str:
    """A setting's help, its range, and whether it changes a result."""
    words = [field.metadata["help"]]
    allowed = field.metadata["range"].words()
    if allowed:
        words.append(f"{allowed[0].upper()}{allowed[1:]}.")
    if name in NO_EFFECT:
        words.append("*No effect.*")
    return " ".join(words)


def read_yaml(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The defaults list of a YAML file, and its own values under dotted keys, not resolved."""
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    defaults = content.pop("defaults", [])
    return defaults, flatten({str(key): value for key, value in content.items()})


def load_values(path: Path) -> dict[str, Any]:
    """The values of a YAML file, those of files in the same folder that it builds on included."""
    defaults, values = read_yaml(path)
    inherited: dict[str, Any] = {}
    for entry in defaults:
        if isinstance(entry, str) and (path.parent / f"{entry}.yaml").is_file():
            inherited |= load_values(path.parent / f"{entry}.yaml")
    return inherited | values


def schema_name(path: Path) -> str | None:
    """NAME of the ``/schema/GROUP/NAME@_here_`` that the file of an option builds on, if any."""
    for entry in read_yaml(path)[0]:
        if isinstance(entry, str) and entry.startswith("/schema/"):
            return entry.removesuffix("@_here_").rpartition("/")[2]
    return None


def head_comment(path: Path) -> str:
    """The comment at the top of a YAML file, up to an empty line, a list or a command in it."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# ") or line.startswith("#  "):
            break
        words.append(line.removeprefix("# "))
    return " ".join(words)


def in_yaml(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(in_yaml, value))}]"
    return str(value)


def section(configs: Path, group: str) -> str:
    """A group: its options, with the defaults that differ between them, and its settings."""
    _, text = GROUPS[group]
    own, values = read_options(configs, group)
    default_option = chosen_option(configs, group)
    options_of: dict[Row, list[str]] = {}
    for option, fields in own.items():
        for field in fields:
            options_of.setdefault(field, []).append(option)
    defaults = {
        field: {in_yaml(values[option][field.name]) for option in options}
        for field, options in options_of.items()
    }
    differing = [field for field in options_of if len(defaults[field]) > 1]
    options_table = table(
        ["option", "", *(code(field.name) for field in differing)],
        [
            [
                code(option),
                head_comment(configs / group / f"{option}.yaml"),
                *(code(in_yaml(values[option][f.name])) if f in fields else "" for f in differing),
            ]
            for option, fields in own.items()
        ],
    )
    parts = [f"## {group}", f"{text} The default is `{group}={default_option}`.", options_table]
    if options_of:
        rows = [
            [
                code(field.name),
                "" if len(options) == len(own) else ", ".join(map(code, options)),
                field.type,
                "see above" if field in differing else code(*defaults[field]),
                field.meaning,
            ]
            for field, options in options_of.items()
        ]
        parts.append(table(["setting", "only with", "type", "default", "meaning"], rows))
    return "\n\n".join(parts)


def read_options(
    configs: Path, group: str
) -> tuple[dict[str, list[Row]], dict[str, dict[str, Any]]]:
    """Of each option of a group its settings, and their default values by name."""
    prefixes, _ = GROUPS[group]
    classes = {name: node for g, name, node in OPTIONS if g == group}
    of_config = {field.name: field.type for field in dataclasses.fields(Config)}
    fields: dict[str, list[Row]] = {}
    values: dict[str, dict[str, Any]] = {}
    for path in sorted((configs / group).glob("*.yaml"), key=natural):
        loaded = load_values(path)
        name = schema_name(path)
        fields[path.stem] = []
        for prefix in prefixes:
            # Without a schema of its own it has that of the field of Config.
            kind = of_config[prefix] if name is None else classes[name]
            fields[path.stem] += rows_of(kind, f"{prefix}.")
        # A file for the whole configuration has the prefix already.
        values[path.stem] = {
            f.name: loaded[f.name] if f.name in loaded else loaded[f.name.partition(".")[2]]
            for f in fields[path.stem]
        }
    return fields, values


def natural(path: Path) -> list[Any]:
    """A key that sorts resnet8 before resnet20."""
    return [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", path.stem)]


def chosen_option(configs: Path, group: str) -> str:
    """What config.yaml chooses of a group."""
    defaults, _ = read_yaml(configs / "config.yaml")
    return next(str(e[group]) for e in defaults if isinstance(e, dict) and group in e)


def table(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (head, *rows)]
    return "\n".join(markdown_table(escaped, "l" * len(head)))


def code(text: str) -> str:
    return f"`{text}`"


def run_section(configs: Path) -> str:
    """The settings that belong to no group."""
    values = load_values(configs / "config.yaml")
    grouped = {prefix for prefixes, _ in GROUPS.values() for prefix in prefixes}
    rows = [
        [code(row.name), row.type, code(in_yaml(values[row.name])), row.meaning]
        for row in rows_of(Config, "")
        if row.name.partition(".")[0] not in grouped
    ]
    text = "Settings of the run itself."
    return f"## run\n\n{text}\n\n{table(['setting', 'type', 'default', 'meaning'], rows)}"


def experiment_section(configs: Path) -> str:
    rows = [
        [code(path.stem), head_comment(path)]
        for path in sorted((configs / "experiment").glob("*.yaml"), key=natural)
    ]
    text = (
        "Whole recipes, which set several of the above at once; none by default. Each file in "
        "configs/experiment/ begins with its command, the hardware and the expected result."
    )
    return f"## experiment\n\n{text}\n\n{table(['option', ''], rows)}"


def page(configs: Path) -> str:
    """The text of docs/settings.md for the schema and the YAML files in ``configs``."""
    sections = [section(configs, group) for group in GROUPS]
    parts = [INTRO.strip(), run_section(configs), *sections, experiment_section(configs)]
    return "\n\n".join(parts) + "\n"


@command(options)
def main(args: argparse.Namespace) -> None:
    text = page(CONFIGS)
    if not args.check:
        write_text(PAGE, text)
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise ValueError(f"{PAGE.name} is out of date; run {COMMAND}")
