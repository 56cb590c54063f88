"""docs/quickstart.ipynb: run from first cell to last at a tiny size, and then run again."""

import json
import os
import re
import subprocess
import sys

import pytest

from helpers import ROOT

PAGE = ROOT / "docs" / "quickstart.ipynb"
TINY = ["data.train_size=64", "data.test_size=16", "epochs=1", "batch_size=16"]
TINY += ["model.widths=[4,8,8]", "model.stem=4", "precision=fp32", "device=cpu"]
# Runs in its own process, because the kernel's client has an event loop and threads.
RUN = """
import sys
import nbformat
from nbclient import NotebookClient
page, folder = sys.argv[1:]
notebook = nbformat.read(page, 4)
NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
nbformat.write(notebook, page)
"""


def sources(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook, words):
    """Return the output of the cell that contains ``words``."""
    code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    (cell,) = (cell for cell in code if words in "".join(cell["source"]))
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def shown(notebook):
    return [
        kind
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
        if kind != "text/plain"
    ]


@pytest.mark.thorough
@pytest.mark.long
def test_it_runs_and_goes_on_where_it_was_cut_off(tmp_path):
    notebook = json.loads(PAGE.read_text(encoding="utf-8"))
    (settings,) = (cell for cell in notebook["cells"] if "EXTRA = []" in "".join(cell["source"]))
    text = "".join(settings["source"])
    text = text.replace("EXTRA = []", f"EXTRA = {TINY!r}")
    settings["source"] = text.replace('OUT = "outputs"', f"OUT = {str(tmp_path / 'out')!r}")
    copy = tmp_path / "quickstart.ipynb"
    copy.write_text(json.dumps(notebook))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CIFAR_ROOT": str(tmp_path / "none"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "PYTHONPATH": str(offline(tmp_path)),
    }
    command = [sys.executable, "-c", RUN, copy, ROOT / "docs"]
    for finished in (0, 2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(copy.read_text())
        said = printed(result, "compare.py")
        assert said.count(": training (") == 2 - finished
        assert "report.html" in said
        pictures = ["text/markdown", "image/svg+xml", "image/svg+xml", "image/svg+xml"]
        assert shown(result) == [*pictures, "image/png"]
        assert "experiment=lookup" in printed(result, "reachable(")
    assert sources(result)[1:] == sources(notebook)[1:]


def offline(tmp_path):
    """A folder with a sitecustomize that keeps processes from connecting to other machines."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*_, **__):\n"
        "    raise OSError('offline')\n"
        "socket.create_connection = refuse\n"
    )
    return folder


def test_what_is_committed_has_been_run_and_names_no_machine():
    text = PAGE.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(o["output_type"] == "error" for cell in code for o in cell["outputs"])
    assert shown(notebook).count("image/png") == 1
    assert "finished" in printed(notebook, "compare.py")
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert "EXTRA = []" in sources(notebook)[0]
