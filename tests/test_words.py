"""Command-line arguments that Hydra would interpret in an unexpected way."""

import pytest

from training.compose import compose_config
from training.launch import override
from training.words import expand


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim={'lr': 0.05}", ["optim.lr=0.05"]),
        (
            "optim={'lr': 0.05, 'betas': [0.9, 0.99], 'decay': 'all'}",
            ["optim.lr=0.05", "optim.betas=[0.9, 0.99]", "optim.decay='all'"],
        ),
        (
            "wandb={'mode': 'offline', 'entity': None}",
            ["wandb.mode='offline'", "wandb.entity=null"],
        ),
        ("model={'aa': {'dk': 0.5, 'Nh': 2}}", ["model.aa.dk=0.5", "model.aa.Nh=2"]),
        ("tracking={'media': False}", ["tracking.media=false"]),
        *(
            (word, [word])
            for word in ("model.aa={dk:0.5}", "optim={}", "optim={'lr'", "name=a", "-m")
        ),
        ("optim={'lr'}", ["optim={'lr'}"]),
        ("optim={'a':b}", ["optim={'a':b}"]),
    ],
)
def test_nested_parameters_of_a_wandb_sweep_are_settings(word, expected):
    assert expand(word) == expected


def test_what_they_become_is_what_they_were():
    cfg = compose_config(
        [*expand("optim={'lr': 0.05, 'decay': 'weights'}"), *expand("data={'val_size': 7}")]
    )
    assert (cfg.optim.lr, cfg.optim.decay.name, cfg.data.val_size) == (0.05, "weights", 7)


@pytest.mark.parametrize(
    "value",
    ["a=b,c", "a'b", "a\\", "a\\'b", 'a"b', "${b}", "\\${b}", "\\\\${b:c}'", "$b", "\udcff"],
)
def test_a_text_reaches_the_settings_as_it_is(value):
    assert compose_config([override("run_dir", value)]).run_dir == value
