"""Run folders as they lie on disk: which are results, and which of those belong together."""

import csv
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.run_folder import FAILURE
from training.variants import result_settings

# Any of these makes a folder a run's.
TRACES = {"metrics.csv", "summary.json", "last.pt", FAILURE}
# As the paper's Table 1 orders and writes them.
ATTENTION = {"plain": "plain", "ge": "GE", "se": "SE", "aa": "AA"}
# The settings that are named first where several would tell two groups apart.
TELLING = ("epochs", "batch_size", "optim.lr", "optim.weight_decay", "data.val_size")


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder, its summary, and its figures of every epoch."""

    folder: Path
    summary: dict[str, Any]
    rows: list[dict[str, float]]

    @property
    def seed(self) -> int:
        return int(self.summary["config"]["seed"])

    @property
    def data(self) -> str:
        return f"{self.summary['data']} {self.summary['evaluated_on']}"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the result, but for the seed; flat."""
        # model.aa is where attention.* has its defaults from, and says nothing beside them.
        settings = result_settings(self.summary["config"])
        return {k: v for k, v in settings.items() if k != "seed" and not k.startswith("model.aa.")}


@dataclass(frozen=True)
class Left:
    """A folder that is not counted, and why."""

    folder: Path
    kind: str  # unfinished, diverged, other data, repeated or unreadable
    why: str


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in the seed alone, under a name that tells them from the others."""

    label: str
    runs: list[Run]  # by seed, no seed twice

    @property
    def first(self) -> dict[str, Any]:
        return self.runs[0].summary

    @property
    def model(self) -> str:
        return str(self.first["model"])

    @property
    def attention(self) -> str:
        return str(self.first["attention"])

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def scores(self, name: str) -> dict[int, float]:
        """A score of the last epoch by seed."""
        return {run.seed: float(run.summary[name]) for run in self.runs}

    def seen(self, fact: str) -> list[str]:
        """The different values of a fact that is no setting: commit, hardware, precision, torch."""
        facts = (run.summary | run.summary.get("versions", {}) for run in self.runs)
        return sorted({str(one.get(fact, "unknown")) for one in facts})


def read(folders: list[Path]) -> tuple[list[Run], list[Left]]:
    """The finished runs below ``folders``, and what else lies there.

    Raises:
        ValueError: a folder does not exist, or there is no run in any; the message names it.
    """
    places: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        for path, _, names in os.walk(folder):
            if TRACES.intersection(names):
                places.add(Path(path))
    if not places:
        raise ValueError(
            f"no run in {', '.join(map(str, folders))}: there is no metrics.csv below it"
        )
    runs, left = [], []
    for place in sorted(places):
        found = _read(place)
        if isinstance(found, Run):
            runs.append(found)
        else:
            left.append(found)
    return runs, left


def _read(folder: Path) -> Run | Left:
    try:
        if (folder / FAILURE).exists():
            return Left(folder, "diverged", json.loads((folder / FAILURE).read_text())["error"])
        rows = []
        if (folder / "metrics.csv").exists():
            with (folder / "metrics.csv").open() as file:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        if not (folder / "summary.json").exists():
            return Left(folder, "unfinished", f"{len(rows)}{_wanted(folder)} epochs")
        run = Run(folder, json.loads((folder / "summary.json").read_text()), rows)
        epochs, wanted = run.summary["epochs"], run.summary["config"]["epochs"]
        if epochs != wanted or len(rows) != wanted:
            return Left(folder, "unfinished", f"{min(epochs, len(rows))} of {wanted} epochs")
        if not all(math.isfinite(run.summary[k]) for k in ("train_loss", "eval_loss", "top1")):
            return Left(folder, "diverged", "a figure of the last epoch is not finite")
        assert run.data
        assert run.seed >= 0
        assert run.settings
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        return Left(folder, "unreadable", f"{type(error).__name__}: {error}")
    return run


def _wanted(folder: Path) -> str:
    """The length of an unfinished run, as far as Hydra's copy of its settings tells."""
    try:
        return f" of {OmegaConf.load(folder / '.hydra' / 'config.yaml').epochs}"
    except (OSError, AttributeError, OmegaConfBaseException):
        return ""


def of_one_data(runs: list[Run], wanted: str | None) -> tuple[str, list[Run], list[Left]]:
    """The data set that most runs are of, or the ``wanted`` one; its runs, and the others.

    Raises:
        ValueError: no run is of the data set ``wanted``.
    """
    counts = Counter(run.data for run in runs)
    if wanted is not None:
        counts = Counter({k: n for k, n in counts.items() if wanted in (k, k.partition(" ")[0])})
        if not counts:
            known = ", ".join(sorted({run.data for run in runs}))
            raise ValueError(f"--data {wanted}: no finished run is of it; there are {known}")
    data = max(sorted(counts), key=counts.__getitem__)
    others = [Left(r.folder, "other data", r.data) for r in runs if r.data != data]
    return data, [run for run in runs if run.data == data], others


def group(runs: list[Run]) -> tuple[list[Group], list[Left]]:
    """Runs by everything that decides a result but the seed, in the order of Table 1.

    A seed that is there twice is no second sample: the first folder counts.
    """
    members: dict[str, dict[int, Run]] = {}
    left = []
    for run in runs:
        facts = [run.summary["model"], run.summary["attention"], run.settings]
        same = members.setdefault(json.dumps(facts, sort_keys=True), {})
        if run.seed in same:
            why = f"seed {run.seed} of the same settings is in {same[run.seed].folder}"
            left.append(Left(run.folder, "repeated", why))
        else:
            same[run.seed] = run
    groups = [Group("", [same[seed] for seed in sorted(same)]) for same in members.values()]
    order = list(ATTENTION)
    labels = _labels(groups)
    groups = [Group(labels[one], one.runs) for one in groups]
    groups.sort(key=lambda g: (g.model, order.index(g.attention), _natural(g.label)))
    return groups, left


def _labels(groups: list[Group]) -> dict[Group, str]:
    models = {one.model for one in groups}
    labels = {}
    for one in groups:
        like = [g for g in groups if (g.model, g.attention) == (one.model, one.attention)]
        words = [one.model] if len(models) > 1 else []
        words.append(ATTENTION[one.attention])
        words += [f"{short(k)}={as_text(one.settings.get(k))}" for k in _telling(like)]
        labels[one] = " ".join(words)
    return labels


def _telling(groups: list[Group]) -> list[str]:
    """The attention's settings in which the groups differ, and few others that tell them apart."""
    keys = sorted({key for one in groups for key in one.settings})
    keys = [k for k in keys if len({as_text(g.settings.get(k)) for g in groups}) > 1]
    told = [k for k in keys if k.startswith("attention.")]

    def apart(by: list[str]) -> int:
        return len({tuple(as_text(g.settings.get(k)) for k in by) for g in groups})

    for key in sorted(keys, key=lambda k: (TELLING.index(k) if k in TELLING else 99, k)):
        if apart([*told, key]) > apart(told):
            told.append(key)
    return told


def short(key: str) -> str:
    """A setting's name without its group, where that is clear."""
    return key.removeprefix("attention.").removeprefix("optim.")


def as_text(value: Any) -> str:
    """A setting's value as its override is written."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, list) else str(value)


def _natural(text: str) -> list[tuple[float, str]]:
    """Sorts dk=8 before dk=16."""

    def part(word: str) -> tuple[float, str]:
        try:
            return float(word), ""
        except ValueError:
            return math.inf, word

    return [part(word) for word in text.replace("=", " ").split()]
