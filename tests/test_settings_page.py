"""docs/settings.md and the schema it is generated from: every setting is there and documented.

The page is compared with the schema's classes and with the YAML files.
"""

import dataclasses
import enum
import shutil

import pytest

from configs import schema
from configs.setting import Range
from scripts import settings

from helpers import CONFIGS, call


def all_settings():
    """Return (dotted name, field) of every setting of every option, from the schema's classes."""
    found = []

    def walk(node, prefix):
        for field in dataclasses.fields(node):
            if dataclasses.is_dataclass(field.type):
                walk(field.type, f"{prefix}{field.name}.")
            elif field.name[0] != "_":
                found.append((prefix + field.name, field))

    walk(schema.Config, "")
    for group, _, node in schema.OPTIONS:
        walk(node, f"{group}.")
    return found


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """A function that runs the command on copies of configs/ and the page; it returns the error."""
    shutil.copytree(CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(settings.PAGE, tmp_path / "settings.md")
    monkeypatch.setattr(settings, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(settings, "PAGE", tmp_path / "settings.md")

    def go(*words):
        try:
            call(settings.main, *words)
        except SystemExit as stopped:
            line = capsys.readouterr().err.rstrip("\n")
            return line if stopped.code == 2 else f"code {stopped.code}"
        return None

    return go


def test_the_page_is_current(command):
    assert command("--check") is None


def test_a_change_of_the_settings_makes_the_page_stale(command, tmp_path):
    network = tmp_path / "configs" / "model" / "resnet20.yaml"
    network.write_text(network.read_text(encoding="utf-8").replace("stem: 16", "stem: 17"))
    before = (tmp_path / "settings.md").read_bytes()
    said = command("--check")
    assert said == "settings.py: settings.md is out of date; run python scripts/settings.py"
    assert (tmp_path / "settings.md").read_bytes() == before
    (tmp_path / "settings.md").unlink()
    assert command("--check") == said
    assert command() is None
    assert (tmp_path / "settings.md").read_bytes() != before


def test_every_setting_has_a_meaning():
    found = all_settings()
    assert len(found) > 60
    for name, field in found:
        words = field.metadata["help"].split()
        assert len(words) >= 2, name
        assert words[-1][-1] in ".:%", name


def test_the_page_has_every_setting_its_meaning_and_its_range():
    page = settings.PAGE.read_text(encoding="utf-8")
    groups = {group for group, *_ in schema.OPTIONS}
    for name, field in all_settings():
        if name not in groups:
            assert f"\n| `{name}` |" in page, name
            assert field.metadata["help"] in page, name
    (line,) = [line for line in page.splitlines() if line.startswith("| `optim.momentum` |")]
    assert line.endswith(" At least 0 and below 1. |")


def test_the_page_has_every_option():
    page = settings.PAGE.read_text(encoding="utf-8")
    options = list(CONFIGS.glob("*/*.yaml"))
    assert len(options) > 30
    for path in options:
        assert f"\n| `{path.stem}` |" in page, path


def test_settings_without_an_effect_are_marked():
    lines = settings.PAGE.read_text(encoding="utf-8").splitlines()
    marked = {line.split("`")[1] for line in lines if line.endswith(" *No effect.* |")}
    assert marked == schema.NO_EFFECT


class Color(enum.Enum):
    red = 1
    blue = 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "int"),
        (float | None, "float or null"),
        (int | float, "int or float"),
        (list[int], "list of int"),
        (Color, "`red`, `blue`"),
    ],
)
def test_types_in_words(kind, words):
    assert settings.type_in_words(kind) == words


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"at_least": 0, "below": 1}, [0, 0.999], [-1e-9, 1, float("nan")]),
        ({"above": 0, "at_most": 2}, [1e-9, 2], [0, 2.1, float("-inf")]),
        ({"above": 0}, [1e30], [0, 1e31, float("inf")]),
        ({"length": 2, "at_least": 0}, [[0, 1]], [[0], [0, 1, 2], [0, -1]]),
        ({"at_least": 1}, [[], [3, 1], None], [[3, 0]]),
    ],
)
def test_a_range_allows_what_its_words_say(bounds, inside, outside):
    allowed = Range(**bounds)
    assert all(map(allowed.allows, inside))
    assert not any(map(allowed.allows, outside))
    for word, bound in bounds.items():
        assert f"{word.replace('_', ' ')} {bound}" in allowed.words() or word == "length"
