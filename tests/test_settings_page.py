"""docs/settings.md and the schema it is written from: every setting is there, and means something.

The schema is read here by importing it and by its tokens, in the script from its syntax tree.
"""

import dataclasses
import io
import shutil
import sys
import tokenize

import pytest

from configs import schema
from scripts import settings

from helpers import CONFIGS

# Fields that are groups of settings, which the page has sections for.
GROUPS_OF_CONFIG = ("model", "attention", "data", "optim", "schedule", "wandb", "tracking")
SOURCE = (CONFIGS / "schema.py").read_text(encoding="utf-8")


def config_classes():
    return [node for node in vars(schema).values() if dataclasses.is_dataclass(node)]


def comment_lines():
    """The whole-line comments of the schema by their line's number."""
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    return {
        t.start[0]: t.string.removeprefix("#").strip()
        for t in tokens
        if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip()
    }


def fields_with_lines():
    """(class, field, line) of every setting, found by the text of its class's body."""
    lines = SOURCE.splitlines()
    for node in config_classes():
        start = next(n for n, line in enumerate(lines) if line.startswith(f"class {node.__name__}"))
        for field in dataclasses.fields(node):
            if field.name in node.__annotations__ and field.name[0] != "_":
                offset = next(
                    n
                    for n, line in enumerate(lines[start:])
                    if line.startswith(f"    {field.name}: ")
                )
                yield node.__name__, field.name, start + offset + 1


def all_settings():
    """Dotted keys of every setting of every option, by the schema's classes themselves."""
    keys = set()

    def walk(node, prefix):
        for field in dataclasses.fields(node):
            if dataclasses.is_dataclass(field.type):
                walk(field.type, f"{prefix}{field.name}.")
            elif field.name[0] != "_":
                keys.add(prefix + field.name)

    walk(schema.Config, "")
    for group, _, node in schema.OPTIONS:
        keys.discard(group)
        walk(node, f"{group}.")
    return keys


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command on a copy of configs/ and of the page; a function from its words to its end."""
    shutil.copytree(CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(settings.PAGE, tmp_path / "settings.md")
    monkeypatch.setattr(settings, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(settings, "PAGE", tmp_path / "settings.md")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["settings.py", *words])
        try:
            settings.main()
        except SystemExit as stopped:
            return stopped.code
        return None

    return call


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_page_is_current(command):
    assert command("--check") is None


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("schema.py", "# Epochs to train, ", "# Epochs of training, "),
        pytest.param(
            "schema.py",
            "    epochs: int = MISSING",
            "    epochs: float = MISSING",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "schema.py",
            '    fp16 = "fp16"\n',
            '    fp16 = "fp16"\n    fp8 = "fp8"\n',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "config.yaml", "  - model: resnet20", "  - model: resnet32", marks=pytest.mark.slow
        ),
        ("model/resnet8.yaml", "stem: 16", "stem: 17"),
        pytest.param("attention/se.yaml", "# Squeeze", "# The squeeze", marks=pytest.mark.slow),
        pytest.param(
            "tracking/wandb.yaml", "project: aaconv", "project: other", marks=pytest.mark.slow
        ),
        pytest.param(
            "experiment/cpu.yaml", "for 7 epochs", "for seven epochs", marks=pytest.mark.slow
        ),
    ],
)
def test_a_change_of_the_settings_makes_the_page_stale(command, tmp_path, file, old, new):
    replace(tmp_path / "configs" / file, old, new)
    before = (tmp_path / "settings.md").read_bytes()
    said = command("--check")
    assert said == "settings.py: settings.md is out of date; run python scripts/settings.py"
    assert (tmp_path / "settings.md").read_bytes() == before
    assert command() is None
    assert (tmp_path / "settings.md").read_bytes() != before


def test_a_page_that_is_not_there_is_out_of_date(command, tmp_path):
    (tmp_path / "settings.md").unlink()
    assert "is out of date" in command("--check")
    assert not (tmp_path / "settings.md").exists()


def test_every_setting_has_a_comment_with_text():
    comments = comment_lines()
    found = list(fields_with_lines())
    assert len(found) > 60
    for class_name, name, line in found:
        words = comments.get(line - 1, "").split()
        assert len(words) >= 2, f"{class_name}.{name} has no comment in the line above it"


def test_the_page_has_every_setting_and_its_whole_comment():
    page = settings.PAGE.read_text(encoding="utf-8")
    for key in all_settings():
        assert f"\n| `{key}` |" in page, key
    comments = comment_lines()
    for _, name, line in fields_with_lines():
        words = []
        while (line := line - 1) in comments:
            words.insert(0, comments[line])
        if name not in (*GROUPS_OF_CONFIG, "aa"):
            assert " ".join(words) in page


def test_the_page_has_every_option():
    page = settings.PAGE.read_text(encoding="utf-8")
    options = list(CONFIGS.glob("*/*.yaml"))
    assert len(options) > 30
    for path in options:
        assert f"\n| `{path.stem}` |" in page, path


def test_settings_without_an_effect_exist_and_are_marked():
    assert set(schema.NO_EFFECT_ON_RESULT) <= all_settings()
    assert len(set(schema.NO_EFFECT_ON_RESULT)) == len(schema.NO_EFFECT_ON_RESULT)
    lines = settings.PAGE.read_text(encoding="utf-8").splitlines()
    marked = {line.split("`")[1] for line in lines if line.endswith(" *No effect.* |")}
    assert marked == set(schema.NO_EFFECT_ON_RESULT)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("int", "int"),
        ("Optional[float]", "float or null"),
        ("Union[int, float]", "int or float"),
        ("list[int]", "list of int"),
        ("Colour", "`red`, `blue`"),
    ],
)
def test_types_in_words(annotation, words):
    known = settings.Schema({}, {"Colour": ["red", "blue"]})
    assert settings.type_in_words(known, annotation) == words
