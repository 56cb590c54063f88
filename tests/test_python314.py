"""Hydra's parser with the argparse of Python 3.14, simulated on older versions."""

import argparse
import contextlib
import inspect
import textwrap

import pytest
from hydra._internal.utils import get_args_parser

from training import cli

from helpers import call

CONTAINER = argparse._ActionsContainer


def check_help(self, action):
    """Check an action's help the way Python 3.14 does before adding it."""
    if action.help and hasattr(self, "_get_formatter"):
        formatter = self._get_formatter()
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("badly formed help string") from error


@pytest.fixture
def python314(monkeypatch):
    """Simulate Python 3.14's argparse, which has one more call in ``add_argument``."""
    if hasattr(CONTAINER, "_check_help"):
        return
    source = textwrap.dedent(inspect.getsource(CONTAINER.add_argument))
    last = "    return self._add_action(action)\n"
    assert source.endswith(last)
    source = source.removesuffix(last) + "    self._check_help(action)\n" + last
    names = {}
    exec(source, vars(argparse), names)
    monkeypatch.setattr(CONTAINER, "add_argument", names["add_argument"])
    monkeypatch.setattr(CONTAINER, "_check_help", check_help, raising=False)


@pytest.mark.usefixtures("python314")
def test_hydras_parser_cannot_be_made_without_help():
    # If this no longer raises, training/cli.py need not disable the check.
    with pytest.raises(ValueError, match="badly formed help string"):
        get_args_parser()


@pytest.mark.usefixtures("python314")
@pytest.mark.parametrize(
    ("option", "text"), [("--cfg=job", "epochs: 200"), ("--hydra-help", "Install or Uninstall")]
)
def test_the_command_works(capsys, option, text):
    with contextlib.suppress(SystemExit):  # Hydra raises it after printing its help
        call(cli.run, option)
    assert text in capsys.readouterr().out
