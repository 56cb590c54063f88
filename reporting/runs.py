"""Read run folders: which hold a result, and which results belong to the same variant."""

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from models import ATTENTIONS
from models.fields import UnreadableError
from reporting.text import as_text, commit, count, natural, rounded, short, single_line
from training import outcome, run_folder
from training.records import SCORES, Summary
from training.variants import images_key, variant_settings

Item = TypeVar("Item")
Key = TypeVar("Key")

# Settings preferred in labels if several of them would tell two variants apart.
NAMED_FIRST = ("epochs", "batch_size", "optim.lr", "optim.weight_decay", "data.val_size")
NOT_SET = "not set"
UNKNOWN = "unknown"
# Kinds of excluded folders, in listing order.
KINDS = (
    *("diverged", "refused", "failed", "unfinished", "of another data set", "duplicate"),
    "unreadable",
)
# The kind of an excluded folder by the outcome of its run.
_EXCLUDED = {
    outcome.DIVERGED: "diverged",
    outcome.STOPPED: "unfinished",
    outcome.NOT_STARTED: "unfinished",
    outcome.FAILED: "unreadable",
}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder, its summary, and one row of metrics per epoch."""

    folder: Path
    summary: Summary
    rows: list[dict[str, float]]

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def data(self) -> str:
        """The data set and the evaluated split: `cifar100 test`."""
        return f"{self.summary['data']} {self.summary['evaluated_on']}"

    @property
    def data_digest(self) -> str:
        """The digest of the images; `UNKNOWN` for runs of older code, which did not record it."""
        return self.summary.get("data_digest", UNKNOWN)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that affect the result, except for the seed, as flat keys."""
        return variant_settings(self.summary["config"])

    def last(self, name: str) -> float:
        """A score or measurement of the summary; `top1` is that of the evaluated split."""
        summary: Mapping[str, Any] = self.summary
        return float(summary[self._key(name)])

    def each_epoch(self, name: str) -> list[float]:
        """The values of a score or measurement, one per epoch."""
        return [row[self._key(name)] for row in self.rows]

    def has(self, name: str) -> bool:
        """Whether `each_epoch` has this column; runs of earlier versions have fewer columns."""
        return self._key(name) in self.rows[0]

    def conditions(self, name: str) -> list[str]:
        """A condition that is not a setting but may affect the numbers, for each start of the run.

        ``name`` is commit, hardware, precision, processes, or a package (for its version).
        """
        segments = [{**segment["versions"], **segment} for segment in self.summary["segments"]]
        values = [str(segment.get(name, UNKNOWN)) for segment in segments]
        return [commit(value) for value in values] if name == "commit" else values

    def _key(self, name: str) -> str:
        return f"{self.summary['evaluated_on']}/{name}" if name in SCORES else name


@dataclass(frozen=True)
class Excluded:
    """A folder whose run is excluded from all numbers, and the reason."""

    folder: Path
    kind: str  # one of KINDS
    why: str
    settings: dict[str, Any] | None = None  # flat; None if unknown or if the run has a result


@dataclass(frozen=True, eq=False)
class Variant:
    """Runs that differ only in the seed, with a unique label."""

    label: str
    runs: list[Run]  # sorted by seed, without duplicates

    @property
    def first(self) -> Summary:
        return self.runs[0].summary

    @property
    def model(self) -> str:
        return self.first["model"]

    @property
    def attention(self) -> str:
        return self.first["attention"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def setting(self, key: str) -> str:
        return in_words(self.settings, key)

    def by_seed(self, name: str) -> dict[int, float]:
        """A last-epoch score or another number of the summary, by seed."""
        return {run.seed: run.last(name) for run in self.runs}

    def mean(self, name: str) -> float:
        """The mean of `by_seed`."""
        return statistics.fmean(self.by_seed(name).values())


def as_recipe(settings: Mapping[str, Any]) -> str:
    """A text key that is equal for settings whose values are written the same way."""
    return str(sorted((key, as_text(value)) for key, value in settings.items()))


def in_words(settings: Mapping[str, Any], key: str) -> str:
    """The value of a setting as text, or `NOT_SET`."""
    return as_text(settings[key]) if key in settings else NOT_SET


def conditions(runs: list[Run], name: str) -> list[str]:
    """The distinct values of `Run.conditions` over all runs, sorted."""
    return sorted({value for run in runs for value in run.conditions(name)})


# ---- Reading ------------------------------------------------------------------------------------


def read(folders: list[Path]) -> tuple[list[Run], list[Excluded]]:
    """Return the finished runs in and below ``folders``, and the excluded folders.

    A file that is damaged or in another format excludes only its own folder.

    Raises:
        ValueError: if a folder does not exist or none contains a run; the message names it.
    """
    excluded: list[Excluded] = []
    results = [_read_run(path) for path in sorted(_run_folders(folders, excluded))]
    runs = [result for result in results if isinstance(result, Run)]
    excluded += [result for result in results if isinstance(result, Excluded)]
    if not runs and not excluded:
        raise ValueError(
            f"no run in {', '.join(map(str, folders))}: no folder there has a metrics.csv, a "
            "summary.json, a failed.json or a checkpoint"
        )
    return runs, excluded


def _run_folders(folders: list[Path], excluded: list[Excluded]) -> Iterator[Path]:
    def note(error: OSError) -> None:
        why = f"the folder cannot be read ({error.strerror})"
        excluded.append(Excluded(Path(error.filename), "unreadable", why))

    seen = set()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder" if folder.exists() else f"there is no {folder}"
            )
        for path, subfolders, files in os.walk(folder, onerror=note, followlinks=True):
            place = os.path.realpath(path)
            if place in seen:  # under another name, or by a link that leads back up
                subfolders.clear()
                continue
            seen.add(place)
            if run_folder.is_run([*subfolders, *files]) or run_folder.NO_RUN in files:
                yield Path(path)


def _read_run(folder: Path) -> Run | Excluded:
    found, result = outcome.read(folder)
    if result is not None:
        return Run(folder, *result)
    kind, why, config = _EXCLUDED[found.kind], found.why, run_folder.read_settings(folder)
    if found.kind == outcome.NOT_STARTED:
        try:
            if (reason := run_folder.read_no_run(folder)) is not None:
                kind, why, config = reason["outcome"], reason["why"], reason["config"]
        except UnreadableError as error:
            kind, why = "unreadable", str(error)
    settings = None if config is None else variant_settings(config)
    # The report shows the folder in its own column.
    return Excluded(folder, kind, why.removeprefix(f"{folder}{os.sep}"), settings)


# ---- Grouping -----------------------------------------------------------------------------------


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Group items by key; keys are in order of first appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def select_data(runs: list[Run], wanted: str | None) -> tuple[str, list[Run], list[Excluded]]:
    """Select the ``wanted`` data set, or the one with the most runs; return its runs and the rest.

    Raises:
        ValueError: if no run uses the data set ``wanted``.
    """
    counts = Counter(run.data for run in runs)
    if wanted is not None:
        wanted = single_line(wanted)  # from the command line, whose bytes the locale decoded
        known = ", ".join(sorted(counts))
        for data in list(counts):
            if wanted not in (single_line(data), single_line(data.rpartition(" ")[0])):
                del counts[data]
        if not counts:
            raise ValueError(f"--data {wanted}: no finished run uses it; there are {known}")
    data = max(sorted(counts), key=counts.__getitem__)
    chosen = [run for run in runs if run.data == data]
    others = [run for run in runs if run.data != data]
    return data, chosen, [Excluded(r.folder, "of another data set", r.data) for r in others]


def select_images(runs: list[Run]) -> tuple[list[Run], list[Excluded]]:
    """If runs use different images under one name, keep the runs on the most common images.

    Returns the kept runs and the others. Runs of older code, which have no digest, are kept unless
    the runs with a digest disagree.
    """
    alike = grouped(runs, lambda run: (run.data, images_key(run.summary["config"])))
    others = []
    for (data, _), same in alike.items():
        counts = Counter(run.data_digest for run in same if run.data_digest != UNKNOWN)
        if len(counts) < 2:
            continue
        ((chosen, number),) = counts.most_common(1)
        why = f"not {chosen} as of {count(number, 'run')}"
        others += [
            Excluded(
                run.folder,
                "of another data set",
                f"other images that are called {data}, too: digest {run.data_digest}, {why}",
            )
            for run in same
            if run.data_digest != chosen
        ]
    excluded = {other.folder for other in others}
    return [run for run in runs if run.folder not in excluded], others


def group_by_variant(runs: list[Run]) -> tuple[list[Variant], list[Excluded]]:
    """Group runs by all settings that affect the result except for the seed, as in Table 1.

    Runs on other images of the same name are left out, see `select_images`. A repeated seed is not
    a second sample: the first folder counts.
    """
    members: dict[tuple[str, str, str], dict[int, Run]] = {}
    runs, others = select_images(runs)
    duplicates = []
    for run in runs:
        recipe = (run.summary["model"], run.summary["attention"], as_recipe(run.settings))
        same = members.setdefault(recipe, {})
        if run.seed in same:
            why = f"seed {run.seed} of the same settings is in {same[run.seed].folder}"
            duplicates.append(Excluded(run.folder, "duplicate", why))
        else:
            same[run.seed] = run
    variants = _labeled([[same[seed] for seed in sorted(same)] for same in members.values()])
    order = list(ATTENTIONS)
    variants.sort(key=lambda v: (v.model, order.index(v.attention), natural(v.label)))
    return variants, others + duplicates


def _labeled(groups: list[list[Run]]) -> list[Variant]:
    unnamed = [Variant("", runs) for runs in groups]
    several_models = len({variant.model for variant in unnamed}) > 1
    variants = []
    for members in grouped(unnamed, lambda variant: (variant.model, variant.attention)).values():
        first = members[0]
        words = [first.model] if several_models else []
        words.append(ATTENTIONS[first.attention].label)
        keys = distinguishing(members)
        shown = {key: rounded(variant.setting(key) for variant in members) for key in keys}
        for variant in members:
            settings = [f"{short(key)}={shown[key][variant.setting(key)]}" for key in keys]
            label = single_line(" ".join([*words, *settings]))
            variants.append(replace(variant, label=label))
    return variants


def differing_settings(variants: list[Variant]) -> list[str]:
    """The settings whose values differ among the variants, in alphabetical order."""
    keys = sorted({key for variant in variants for key in variant.settings})
    return [key for key in keys if len({variant.setting(key) for variant in variants}) > 1]


def distinguishing(variants: list[Variant]) -> list[str]:
    """The settings that tell the variants apart: all of attention's, others only if needed."""

    def combinations(keys: list[str]) -> int:
        return len({tuple(variant.setting(key) for key in keys) for variant in variants})

    keys = differing_settings(variants)
    named = [key for key in keys if key.startswith("attention.")]
    rank = {key: number for number, key in enumerate(NAMED_FIRST)}
    for key in sorted(keys, key=lambda k: (rank.get(k, len(rank)), k)):
        if combinations([*named, key]) > combinations(named):
            named.append(key)
    return named
