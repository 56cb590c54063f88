"""Copy the results of finished runs, without checkpoints and paths, so they can be committed.

    python scripts/publish.py outputs/compare/NAME results/NAME

For each run below the first folder, metrics.csv and summary.json are copied to the same place below
the second; if it diverged, failed.json and .hydra/config.yaml instead of the summary. That is all
scripts/report.py reads. Settings that do not affect a result, such as folders of this machine and
account names, are left out, as are jobs without a run and step_times.json. Run it again when more
runs have finished. Existing results with other numbers are never replaced, and results on other
images of the same name are not added.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("source", type=Path, metavar="RUNS", help="a folder above finished runs")
    parser.add_argument("target", type=Path, metavar="RESULTS", help="where to copy them")


if __name__ == "__main__":
    start(__file__, options)

import json

from omegaconf import OmegaConf

from reporting.runs import read, select_images
from reporting.text import count, printable
from training.files import write_texts
from training.run_folder import FAILURE, HYDRA, METRICS, SUMMARY, read_settings
from training.variants import public_settings


def result_files(folder: Path) -> dict[str, str]:
    """Return the text of each file of a run that is published, by file name."""
    there = (folder / name for name in (METRICS, SUMMARY, FAILURE))
    texts = {path.name: path.read_text(encoding="utf-8") for path in there if path.exists()}
    if SUMMARY in texts:
        summary = json.loads(texts[SUMMARY])
        summary["config"] = public_settings(summary["config"])
        summary.pop("notes", None)  # they name files
        texts[SUMMARY] = json.dumps(summary, indent=1) + "\n"
    elif FAILURE in texts and (settings := read_settings(folder)) is not None:
        texts[f"{HYDRA}/config.yaml"] = OmegaConf.to_yaml(
            OmegaConf.create(public_settings(settings))
        )
    return texts


def publish(source: Path, target: Path) -> str:
    """Copy the results below ``source`` to the same places below ``target``; return what it did.

    Raises:
        ValueError: if there is nothing to publish, one of the folders is inside the other, a place
            has other results, or results on different images would have the same data set name;
            nothing is written then.
        OSError: if a file cannot be read or written.
    """
    a, b = source.resolve(), target.resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise ValueError(f"{target} and {source} overlap; publish to another folder")
    runs, excluded = read([source])
    published, _ = read([source, target]) if target.is_dir() else (runs, [])
    _, others = select_images(published)
    if others:
        raise ValueError(
            f"{others[0].folder}: {others[0].why}; publish each data set to a folder of its own"
        )
    diverged = [e.folder for e in excluded if e.kind == "diverged"]
    left = [e for e in excluded if e.kind != "diverged"]
    new: dict[Path, str] = {}
    added = 0
    for folder in sorted([*(run.folder for run in runs), *diverged]):
        place = target / folder.relative_to(source)
        texts = {place / name: text for name, text in result_files(folder).items()}
        absent = {path: text for path, text in texts.items() if not is_there(path, text)}
        new |= absent
        added += bool(absent)
    write_texts(new)
    there = len(runs) + len(diverged) - added
    lines = [f"{target}: {count(added, 'run')} added, {count(there, 'run')} already there"]
    lines += [f"left out, {e.kind}: {e.folder} ({e.why})" for e in left]
    return "\n".join(lines)


def is_there(path: Path, text: str) -> bool:
    """Whether ``path`` already holds this text.

    Raises:
        ValueError: if it holds something else.
    """
    if not path.exists():
        return False
    if path.read_text(encoding="utf-8") == text:
        return True
    raise ValueError(f"{path} holds other results; publish to another folder, or remove it first")


@command(options)
def main(args: argparse.Namespace) -> None:
    print(printable(publish(args.source, args.target)))
