"""Hydra's parser under the argparse of Python 3.14, simulated where Python is older."""

import argparse
import contextlib
import inspect
import sys
import textwrap

import pytest
from hydra._internal.utils import get_args_parser

from training import cli
from training.hydra_compat import lazy_help_allowed

CONTAINER = argparse._ActionsContainer


def check_help(self, action):
    """What Python 3.14 does with an action before it is added."""
    if action.help and hasattr(self, "_get_formatter"):
        formatter = self._get_formatter()
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("badly formed help string") from error


@pytest.fixture
def python314(monkeypatch):
    """argparse as in Python 3.14: this version's own, with one more call in ``add_argument``."""
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
    # Where this no longer raises, Hydra needs no training/hydra_compat.py any more.
    with pytest.raises(ValueError, match="badly formed help string"):
        get_args_parser()


@pytest.mark.usefixtures("python314")
def test_hydras_parser_can_be_made_with_it():
    with lazy_help_allowed():
        parser = get_args_parser()
    words = parser.parse_args(["-m", "epochs=1,2"])
    assert words.multirun
    assert words.overrides == ["epochs=1,2"]
    lazy = next(a.help for a in parser._actions if "--shell-completion" in a.option_strings)
    assert "Install or Uninstall" in str(lazy)


@pytest.mark.usefixtures("python314")
@pytest.mark.parametrize(
    ("option", "text"), [("--cfg=job", "epochs: 200"), ("--hydra-help", "Install or Uninstall")]
)
def test_the_command_works(monkeypatch, capsys, option, text):
    monkeypatch.setattr(sys, "argv", ["train.py", option])
    with contextlib.suppress(SystemExit):  # which Hydra raises after its help
        cli.run()
    assert text in capsys.readouterr().out


@pytest.mark.usefixtures("python314")
def test_a_string_is_still_checked_and_everything_is_as_before_afterwards():
    before = CONTAINER._check_help
    with pytest.raises(ValueError, match="badly formed"), lazy_help_allowed():
        argparse.ArgumentParser().add_argument("--share", help="in %")
    assert CONTAINER._check_help is before
    with pytest.raises(ValueError, match="badly formed"):
        argparse.ArgumentParser().add_argument("--lazy", help=object())


@pytest.mark.skipif(hasattr(CONTAINER, "_check_help"), reason="this Python checks help strings")
def test_an_older_argparse_is_left_alone():
    before = dict(vars(CONTAINER))
    with lazy_help_allowed():
        assert dict(vars(CONTAINER)) == before
