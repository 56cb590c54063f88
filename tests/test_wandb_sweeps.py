"""sweeps/*.yaml: every argument that wandb generates from them is a valid setting."""

import itertools
import random

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from training import cli
from training.compose import compose_config
from training.settings import check

from helpers import ROOT, TINY, refused

FILES = sorted((ROOT / "sweeps").glob("*.yaml"))


def load(path):
    return yaml.safe_load(path.read_text())


def expand(command, values):
    """Return the command line that wandb's agent makes from these values."""
    made = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    made |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": ["train.py"]}
    words = []
    for word in create_sweep_command(command):
        macro = word.startswith("${") and word.endswith("}")
        words += made[word[2:-1]] if macro else [word]
    return words


def combinations(parameters):
    """Return all combinations of values; a distribution gives both ends and two draws."""
    draw = random.Random(0)
    axes = {}
    for name, how in parameters.items():
        assert set(how) <= {"values", "distribution", "min", "max"}
        low, high = how.get("min"), how.get("max")
        axes[name] = how.get("values") or [low, high, *(draw.uniform(low, high) for _ in range(2))]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def test_there_are_four():
    names = [path.name for path in FILES]
    assert names == ["bayes.yaml", "grid.yaml", "random.yaml", "seeds.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_command_is_the_projects(path):
    sweep = load(path)
    assert sweep["program"] == "train.py"
    words = expand(sweep["command"], {"seed": 0})
    assert words[:3] == ["/usr/bin/env", "python", "train.py"]
    assert words[-1] == "seed=0"
    assert "resume=auto" in words  # for preempted runs
    assert "seed" in sweep["parameters"]
    assert not [name for name in sweep["parameters"] if "-" in name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_chosen_by_the_test_set(path):
    sweep = load(path)
    held_out = "data.val_size=5000" in sweep["command"]
    assert held_out == ("metric" in sweep) == (path.name != "seeds.yaml")
    if held_out:
        assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_combination_can_be_trained(path):
    sweep = load(path)
    all_values = combinations(sweep["parameters"])
    few = random.Random(1).sample(all_values, min(12, len(all_values)))
    for values in [all_values[0], all_values[-1], *few]:
        cfg = compose_config(expand(sweep["command"], values)[3:])
        check(cfg)
        assert cfg.seed == values["seed"]
        assert cfg.epochs == 30
        for name in ("dk", "dv"):
            if f"attention.{name}" in values:
                assert cfg.attention[name] == values[f"attention.{name}"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("attention.dk", 1.0, 1.0),
        ("attention.dk", 1, 1),
        ("attention.dk", 16, 16),
        ("attention.dk", 0.05, 0.05),
        ("attention.stages", [2, 3], [2, 3]),
        ("optim.lr", 1e-5, 1e-5),
        ("optim.lr", 1.5e-07, 1.5e-07),
        ("optim.betas", [0.9, 0.999], [0.9, 0.999]),
        ("grad_clip", "null", None),
        ("grad_clip", 1, 1.0),
        ("ema", 0.999, 0.999),
        ("compile", True, True),
        ("channels_last", False, False),
        ("precision", "bf16", "bf16"),
        ("attention.position", "none", "none"),
        ("seed", 4294967295, 4294967295),
    ],
)
def test_a_value_arrives_as_it_was_meant(name, value, expected):
    (word,) = expand(["${args_no_hyphens}"], {name: value})
    seen = compose_config([*TINY, word])
    for key in name.split("."):
        seen = seen[key]
    seen = getattr(seen, "name", seen)
    assert seen == expected
    assert type(expected) in (list, float) or type(seen) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "grad_clip",
            None,
            "grad_clip: Value 'None' of type 'str' could not be converted to Float; "
            "write null for no value",
        ),
        ("name", "a,b", "Ambiguous value for argument 'name=a,b'"),
        ("name", "a=b", "for Hydra and for the shell: \"name='a=b'\""),
        ("attention.dk", 16.0, "write 16 for channels"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(name, value, line, tmp_path, capfd):
    words = [*TINY, f"out_dir={tmp_path}", *expand(["${args_no_hyphens}"], {name: value})]
    assert line in refused(capfd, cli.run, *words)
