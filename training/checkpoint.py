"""Save, find, load and restore checkpoints; a run keeps the last two, each whole or absent."""

import glob
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from aaconv.text import one_line
from models.fields import FORMAT, UnreadableError, parse
from models.weight_files import check_tensors, named_tensors, read_torch
from training import images, run_folder
from training.assemble import RunState
from training.device import precision_name
from training.files import write_files
from training.launch import shell_override
from training.progress import Progress
from training.records import Checkpoint
from training.run_folder import LAST, PREVIOUS
from training.variants import result_settings

log = logging.getLogger(__name__)

OTHER_CODE = "was written by a different version of this code"


def save(folder: Path, state: RunState, config: dict[str, Any], reached: Progress) -> None:
    """Write the folder's checkpoint ``last.pt``; the one already there becomes ``previous.pt``.

    See `training.files.write_files` for what remains after a kill or on a full disk.

    Raises:
        OSError: if the checkpoint cannot be written.
    """
    kept: dict[str, Any] = {"format": FORMAT}
    kept |= {name: part.state_dict() for name, part in state.stateful().items()}
    kept |= {"config": config, "description": state.description.model_dump()}
    kept |= reached.state_dict()
    write_files({folder / LAST: lambda file: _write(kept, file)}, before=folder / PREVIOUS)


def _write(state: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch wraps the file's own error, a full disk for example, in a RuntimeError.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def find(resume: str | None, folder: Path) -> list[Path]:
    """Return the checkpoints that ``resume`` (None, ``auto`` or a path) refers to, newest first.

    ``auto`` means those in ``folder``, if there are any. A path names a folder or a single file.

    Raises:
        FileNotFoundError: if ``resume`` is a path without a checkpoint.
    """
    if resume is None:
        return []
    path = folder if resume == "auto" else Path(os.path.expanduser(resume))
    files = [path] if path.is_file() else [path / LAST, path / PREVIOUS]
    found = [file for file in files if file.is_file()]
    if not found and resume != "auto":
        raise FileNotFoundError(
            f"resume={resume}: there is no checkpoint; resume=auto continues the run's own, if any"
        )
    return found


def begin(folder: Path, config: dict[str, Any]) -> tuple[Path | None, dict[str, Any], list[Path]]:
    """Return the checkpoint a run starts from (or None), its state, and the files to replace.

    Those files, damaged or from another run, must be removed in the order given.

    Raises:
        ValueError: see `load`; or if the images have changed since the checkpoint, the summary of
            a finished run is damaged, or ``folder`` holds a run that is neither resumed nor
            replaced, or one that has diverged and would diverge again.
        FileNotFoundError: see `find`.
    """
    resume, overwrite = config["resume"], config["overwrite"]
    found = find(resume, folder)
    if resume == "auto" and (failure := run_folder.read_failure(folder)) is not None:
        if not overwrite and images.differ(failure.get("data_digest"), config):
            file = folder / run_folder.FAILURE
            raise ValueError(images.other_images(file, config["data"]["name"]))
        if not overwrite:
            raise run_folder.DivergedError(
                f"{folder}: this run has diverged ({failure['error']}); with the same settings it "
                "would diverge again; overwrite=true trains it from scratch"
            )
        found = []
    used, state = load(found, config) if found else (None, {})
    if used is not None and images.differ(state["description"]["data_digest"], config):
        if not overwrite or resume != "auto":
            raise ValueError(images.other_images(used, state["description"]["data"]))
        used, state = None, {}
    names = [run_folder.SUMMARY, run_folder.METRICS, run_folder.WEIGHTS]
    names += [run_folder.BEST, run_folder.DESCRIPTION]
    results = [folder / name for name in names]
    if used is not None and is_in(used, folder):
        if len(state["rows"]) == config["epochs"]:
            _check_summary(folder)
        # Remove damaged checkpoints: the next save would keep them as previous.pt in place of the
        # good one. Remove the results, too: they may be ahead of the good checkpoint.
        damaged = found[: found.index(used)]
        return used, state, [*results, *damaged] if damaged else []
    there = [p for p in (*results, folder / PREVIOUS, folder / LAST) if p.exists()]
    if there and not overwrite and resume == "auto":
        raise ValueError(
            f"{folder} holds a run without a checkpoint to continue from; overwrite=true replaces "
            "it"
        )
    if there and not overwrite:
        raise ValueError(
            f"{folder} already holds a run; resume=auto continues it, overwrite=true replaces it"
        )
    return used, state, there


def load(paths: list[Path], config: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the first of ``paths`` that is readable, and its state, on the CPU.

    Each damaged checkpoint is logged, and the next path is tried.

    Raises:
        ValueError: if no checkpoint is readable, or the first readable one was written by another
            version of the code or by a run with other settings, which the message names.
    """
    for index, path in enumerate(paths):
        try:
            state = read_torch(path)
            break
        except UnreadableError as error:
            if path == paths[-1]:
                names = " and ".join(map(str, paths))
                raise ValueError(
                    f"{names}: no readable checkpoint ({error}); "
                    "overwrite=true without resume starts from scratch"
                ) from error
            log.warning("%s is damaged (%s); continuing from %s", path, error, paths[index + 1])
    parse(Checkpoint, state, f"{path} {OTHER_CODE}")
    parse(Progress, state, f"{path} {OTHER_CODE}")
    differing = _differing(state["config"], config)
    differing.pop("precision", None)  # `check_precision` compares what `auto` resolves to
    if differing.keys() == {"epochs"}:
        there, here = differing["epochs"]
        raise ValueError(
            f"{path} is from a run of {there} epochs, and its learning rate is scheduled for them; "
            f"{shell_override('init_from', path.parent)} with another run_dir= or name= starts a "
            f"new schedule of {here} epochs from its weights"
        )
    if differing:
        told = [
            f"{key} ({there} in the checkpoint, {here} now)"
            for key, (there, here) in differing.items()
        ]
        raise ValueError(f"{path} is from a run with other settings: {', '.join(told)}")
    return path, state


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each setting that affects the result and differs, by name."""
    a, b = result_settings(one), result_settings(other)
    values = {key: (a.get(key, "absent"), b.get(key, "absent")) for key in sorted(a.keys() | b)}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def check_precision(state: dict[str, Any], precision: str, asked: str, folder: Path) -> None:
    """Raise ValueError unless the run saved in ``state`` was last trained in ``precision``.

    ``precision`` is the dtype that the setting ``asked`` resolves to on this machine.
    """
    before = state["segments"][-1]["precision"] if state["segments"] else precision
    if before != precision:
        raise ValueError(
            f"precision={asked} is {precision} here, but the run was trained in {before}; "
            f"precision={precision_name(before)} {shell_override('run_dir', folder)} resume=auto "
            "continues it"
        )


def runs_with_other_epochs(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return a hint for each finished run that differs from that of ``folder`` only in epochs."""
    lines = []
    pattern = f"*/{glob.escape(folder.name)}/{run_folder.SUMMARY}"
    for summary in sorted(folder.parent.parent.glob(pattern)):
        try:
            differing = _differing(run_folder.read_summary(summary.parent)["config"], config)
        except (UnreadableError, OSError):
            continue
        if differing.keys() == {"epochs"}:
            there, here = differing["epochs"]
            lines.append(
                f"{summary.parent} is the same run with epochs={there}; "
                f"{shell_override('init_from', summary.parent)} begins with its weights, and a new "
                f"schedule of the learning rate over {here} epochs"
            )
    return lines


def restore(state: dict[str, Any], stateful: dict[str, Any], path: Path) -> None:
    """Load ``state``, read from ``path``, into the ``stateful`` objects.

    There is no random state to restore: random numbers are seeded at every epoch and every step.

    Raises:
        UnreadableError: if the state does not fit: it is damaged or from another version of the
            code.
    """
    try:
        for name, part in stateful.items():
            if name not in state:
                raise KeyError(f"{name} is missing")
            if isinstance(part, nn.Module):  # non-finite values are found during training
                tensors = named_tensors(state[name], name)
                check_tensors(tensors, part.state_dict(), name, "this run's network", finite=False)
                part.load_state_dict(tensors)
                continue
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                _check_shapes(part)
    except Exception as error:  # torch may raise anything on damaged data
        raise UnreadableError(f"{path} {OTHER_CODE}: {one_line(error)}") from error


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnreadableError unless each state tensor of the optimizer has its parameter's shape."""
    for parameter, averages in optimizer.state.items():
        for name, value in averages.items():
            shape = getattr(value, "shape", ())
            if shape not in ((), parameter.shape) or not isinstance(value, Tensor | None):
                raise UnreadableError(f"optimizer: {name} is {tuple(shape)} of {parameter.shape}")


# ---- Starting, continuing or skipping a run ------------------------------------------------------


def _check_summary(folder: Path) -> None:
    """Raise ValueError if ``folder``, whose run has trained all epochs, has a damaged summary."""
    try:
        run_folder.read_summary(folder)
    except FileNotFoundError:
        return
    except UnreadableError as error:
        raise ValueError(f"{error}; without that file resume=auto writes it again") from error


def is_in(file: Path, folder: Path) -> bool:
    """Whether the checkpoint ``file`` is directly in ``folder``."""
    return file.parent.resolve() == folder.resolve()


def finished_before(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary if ``folder`` holds this run, finished and to be resumed; else None.

    The checkpoints of a finished run are not needed: they may be damaged or deleted.

    Raises:
        ValueError, OSError: see `training.images.differ`.
    """
    resume = config["resume"]
    own = resume == "auto" or any(is_in(file, folder) for file in find(resume, folder))
    if not own or (folder / run_folder.FAILURE).exists():
        return None
    try:
        summary = run_folder.read_summary(folder)
    except (FileNotFoundError, UnreadableError):
        return None
    differing = _differing(summary["config"], config)
    differing.pop("precision", None)  # `auto` and `bf16`, for example, may mean the same
    if differing or images.differ(summary.get("data_digest"), config):
        return None  # `begin` reports the difference
    log.info("already finished: %s: %s", run_folder.scores_line(summary), folder)
    return {**summary}


def continue_run(
    state: RunState,
    resumed: Path | None,
    saved: dict[str, Any],
    run_dir: Path,
    config: dict[str, Any],
) -> Progress:
    """Return the progress of a new run, or restore ``state`` and progress from the checkpoint.

    Log which checkpoint was resumed, or that ``resume=auto`` found none.

    Raises:
        ValueError: if the checkpoint was written by a different version of this code.
    """
    if resumed is None:
        if config["resume"] == "auto":
            log.info("resume=auto: nothing to continue in %s; the run begins at epoch 1", run_dir)
            for line in runs_with_other_epochs(run_dir, config):
                log.info("%s", line)
        return Progress.begin(len(state.batches))
    restore(saved, state.stateful(), resumed)
    continued = parse(Progress, saved, f"{resumed}")
    if continued.epoch_state.step > len(state.batches) or len(continued.rows) > config["epochs"]:
        raise UnreadableError(
            f"{resumed} {OTHER_CODE}: it is {continued.position}, and there are "
            f"{config['epochs']} epochs of {len(state.batches)} steps"
        )
    taken = len(continued.rows) * len(state.batches) + continued.epoch_state.step
    if state.schedule.last_epoch != taken:
        raise UnreadableError(
            f"{resumed} {OTHER_CODE}: it is {continued.position}, and schedule.last_epoch is "
            f"{state.schedule.last_epoch} steps, not {taken}"
        )
    log.info("resumed %s %s", resumed, continued.position)
    return continued
