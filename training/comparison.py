"""The runs of a comparison: their plan, their progress, and the time left."""

import datetime
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import images, outcome, run_folder, settings
from training.compose import compose_config, parse_overrides
from training.outcome import DIVERGED, FAILED, Outcome
from training.variants import folder_name, images_key, naming_words

# Settings that compare.py sets itself for each run, and what the user should do instead.
OURS = {
    "seed": "use --seeds",
    "out_dir": "use --out",
    "run_dir": "use --out",
    "hydra.run.dir": "use --out",
    "max_minutes": "use --max-minutes",
    "resume": "leave it out; compare.py always resumes",
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of the comparison: its variant and seed, its folder, and its number of epochs."""

    variant: tuple[str, ...]
    seed: int
    folder: Path
    epochs: int

    def __str__(self) -> str:
        return f"{' '.join(self.variant)} seed={self.seed}"

    @property
    def outcome(self) -> Outcome:
        """The outcome according to the run's files; if it diverged or failed, also the remedy."""
        found, _ = outcome.read(self.folder)
        if found.kind not in (DIVERGED, FAILED):
            return found
        obstacle = self.folder if found.kind == DIVERGED else "that file"
        return Outcome(found.kind, f"{found.why}; remove {obstacle} to train the run again")

    @property
    def missing(self) -> bool:
        """Whether there is something left to train."""
        return self.outcome.kind in outcome.UNFINISHED

    def epoch_seconds(self) -> list[float]:
        """Return the duration of each finished epoch in seconds."""
        try:
            return [row["perf/epoch_seconds"] for row in run_folder.read_metrics(self.folder)]
        except (FileNotFoundError, run_folder.UnreadableError):
            return []


def expand(vary: list[list[str]]) -> list[tuple[str, ...]]:
    """Return the variants as tuples of overrides: for each entry in turn, all its combinations.

    Raises:
        HydraException: if a word is not an override.
    """
    variants: list[tuple[str, ...]] = []
    for words in vary:
        axes = []
        for override in parse_overrides(words):
            key = override.get_key_element()
            if override.is_sweep_override():
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            else:
                # Write the value as Hydra writes those of a sweep: false as False, 1e-3 as 0.001.
                written = f"{key}={override.get_value_element_as_str()}"
                axes.append([str(override.input_line) if override.is_delete() else written])
        variants += itertools.product(*axes)
    return list(dict.fromkeys(variants))


def plan(
    vary: list[list[str]], seeds: list[int], overrides: list[str], out_dir: Path
) -> tuple[Path, list[PlannedRun]]:
    """Check all settings and return the comparison's folder and its runs, ordered by seed.

    Settings that do not affect results are not part of the folder's name: ``device=cuda`` continues
    a comparison started with ``device=cpu``.

    Raises:
        ValueError: if a setting is invalid or reserved for compare.py, or if the images have
            changed since the results in the folder were made.
        OSError: if these images cannot be read.
        HydraException, OmegaConfBaseException: if train.py has no such setting.
    """
    words = [*itertools.chain(*vary), *overrides]
    for override in parse_overrides(words):
        if override.key_or_group in OURS:
            raise ValueError(f"{override.input_line}: {OURS[override.key_or_group]}")
    name = folder_name(naming_words(compose_config(overrides), overrides))
    lengths, data = {}, {}
    for variant in expand(vary):
        cfg = compose_config([*overrides, *variant, f"seed={max(seeds)}"])
        settings.check(cfg)
        lengths[variant] = int(cfg.epochs)
        config = settings.resolve(cfg)
        data[images_key(config)] = config
    comparison = (out_dir / "compare" / name).absolute()
    _check_images(comparison, data)
    runs = [
        PlannedRun(variant, seed, comparison / folder_name(variant) / f"seed={seed}", epochs)
        for seed in dict.fromkeys(seeds)
        for variant, epochs in lengths.items()
    ]
    return comparison, runs


def _check_images(comparison: Path, data: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError if the images have changed since the comparison's results were made.

    Args:
        comparison: the comparison's folder.
        data: settings of the planned runs, by `training.variants.images_key`.
    """
    digests: dict[str, str | None] = {}  # so that images shared by many results are read once
    for folder in filter(Path.is_dir, sorted(comparison.glob("*/*"))):
        digest, config = _images_of(folder)
        key = images_key(config) if digest else ""
        if key in data and key not in digests:
            digests[key] = images.current_digest(data[key])
        if digests.get(key) not in (None, digest):
            raise ValueError(
                f"{folder} is from a run on other images that are also called "
                f"{config['data']['name']}; another data.name= keeps them apart, or remove "
                f"{comparison} to train its runs again"
            )


def _images_of(folder: Path) -> tuple[str | None, Mapping[str, Any]]:
    """Return the digest of the images of a finished or diverged run, and the run's settings.

    The digest is None if there is no such run, or if older code wrote it.
    """
    try:
        failure = run_folder.read_failure(folder)
        if failure is not None:
            config = run_folder.read_settings(folder) or {}
            known = isinstance(config.get("data"), dict)
            return failure.get("data_digest") if known else None, config
        summary = run_folder.read_summary(folder)
    except (FileNotFoundError, run_folder.UnreadableError):
        return None, {}
    return summary.get("data_digest"), summary["config"]


# ---- Progress and time left ---------------------------------------------------------------------


def status(runs: list[PlannedRun], run: PlannedRun) -> str:
    """Return a line with the progress of ``run``, the number of finished runs and the time left."""
    finished = sum(other.outcome.kind == outcome.DONE for other in runs)
    epochs, seconds = len(run.epoch_seconds()), seconds_left(runs)
    where = f"after epoch {epochs} of {run.epochs}" if epochs else "training"
    left = "time left unknown"
    if seconds is not None:
        left = f"about {datetime.timedelta(seconds=round(seconds))} left"
    return f"{numbered(runs, run)}: {where} ({finished} finished, {left})"


def numbered(runs: list[PlannedRun], run: PlannedRun) -> str:
    """Return the name of ``run`` with its position among ``runs``."""
    return f"[{runs.index(run) + 1}/{len(runs)}] {run}"


def seconds_left(runs: list[PlannedRun]) -> float | None:
    """Estimate the seconds the unfinished runs need, from the median epoch of their variant.

    A variant without finished epochs uses the median of all runs; without any, return None. Unlike
    the mean, the median is not distorted by an epoch during which a run was suspended.
    """
    epochs = {run: run.epoch_seconds() for run in runs}
    total = 0.0
    for run in filter(lambda run: run.missing, runs):
        same = [s for other in runs if other.variant == run.variant for s in epochs[other]]
        paces = same or [s for other in runs for s in epochs[other]]
        if not paces:
            return None
        total += (run.epochs - len(epochs[run])) * statistics.median(paces)
    return total
