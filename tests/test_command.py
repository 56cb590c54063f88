"""What all commands share: how they start, and how they report a wrong option."""

import importlib
import os
import subprocess
import sys

import pytest

from scripts.command import check_out, paths_and_overrides

from helpers import ROOT, refused

SCRIPTS = sorted(
    path.name
    for path in (ROOT / "scripts").glob("*.py")
    if path.name not in ("__init__.py", "command.py")
)


def start(*words, **environment):
    """Run a command in a newly started process, not a forked one."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_wrong_option_need_no_library(name, tmp_path):
    for library in ("torch", "hydra", "omegaconf", "matplotlib", "wandb"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('imported')")
    done = start(f"scripts/{name}", "--help", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name} ")
    done = start(f"scripts/{name}", "--none", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: ")
    assert done.stderr.endswith(" (--help shows all options)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["-O", "-OO"])
@pytest.mark.parametrize("program", ["train.py", "scripts/compare.py"])
def test_python_without_assertions_is_refused(program, flag):
    """Hydra's parser has asserts with side effects: without them, settings in braces fail."""
    done = start(flag, program, "--help")
    name = program.rpartition("/")[2]
    line = f"{name}: python -O cannot read settings; leave out -O, -OO and PYTHONOPTIMIZE\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize("level", ["1", "2"])
def test_an_environment_without_assertions_is_refused(level):
    done = start("train.py", "attention={dk: 0.5}", PYTHONOPTIMIZE=level)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train.py: python -O cannot read settings; ")
    assert done.stderr.count("\n") == 1


LONG = ["n" * 300, "d/" * 2500 + "x"]


@pytest.mark.parametrize("place", LONG, ids=["name", "path"])
@pytest.mark.parametrize("name", ["evaluate", "export", "visualize"])
def test_a_name_that_no_file_can_have_is_one_line(name, place, capsys):
    said = refused(capsys, importlib.import_module(f"scripts.{name}").main, place)
    assert place[:60] in said
    assert "name=" not in said  # a setting that these commands do not have


@pytest.mark.parametrize("name", ["compare", "report"])
def test_a_file_is_no_folder_to_write_to(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    main, runs = importlib.import_module(f"scripts.{name}").main, [tmp_path] * (name == "report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *_: None)
        said = refused(capsys, main, *runs, "--out", tmp_path / "file")
    assert said == f"{name}.py: --out {tmp_path / 'file'} is not a folder\n"


@pytest.mark.parametrize("place", LONG, ids=["name", "path"])
def test_a_setting_may_be_longer_than_a_file_name(place):
    assert paths_and_overrides(["run", f"data.root={place}"]) == (["run"], [f"data.root={place}"])
    with pytest.raises(OSError, match="File name too long"):
        check_out(place)
