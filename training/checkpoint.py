"""Everything a run needs to continue: the last two checkpoints, each whole or absent."""

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
    """Write the folder's checkpoint; the one that was there becomes ``previous.pt``.

    See `training.files.write_files` for what stays after a kill or on a full disk.

    Raises:
        OSError: it cannot be written.
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
        # torch hides what the file has raised, a full disk for example, in an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def find(resume: str | None, folder: Path) -> list[Path]:
    """The checkpoints that ``resume`` asks for, the newest first: of None, ``auto`` or a path.

    ``auto`` is the folder's own and may find none. A path is a folder, or one file.

    Raises:
        FileNotFoundError: a path at which there is no checkpoint.
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
    """Where a run in ``folder`` begins: a checkpoint or None, its state, and what it replaces.

    What it replaces, of another run or damaged, is to be removed in the order given.

    Raises:
        ValueError: see `load`; or the checkpoint is of other images than are there now, or the
            summary of a finished run is damaged; or ``folder`` holds a run that is neither resumed
            nor to be replaced, or one that has diverged and would do so again.
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
        # Kept, a damaged one would push the good one out at the next save. The results may be
        # ahead of the good one.
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
    """The first of ``paths`` that is not damaged, and the state in it, on the CPU.

    A damaged one is reported, and the one before it is used.

    Raises:
        ValueError: all are damaged, or the first one that is not was written by another version
            of the code, or by a run with other settings; the message names those that differ.
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
    differing.pop("precision", None)  # what `auto` is here, `check_precision` compares
    if differing.keys() == {"epochs"}:
        there, here = differing["epochs"]
        raise ValueError(
            f"{path} is from a run of {there} epochs, and its learning rate is scheduled for them; "
            f"{shell_override('init_from', path.parent)} with another run_dir= or name= begins a "
            f"new schedule, of {here} epochs, with its weights"
        )
    if differing:
        told = [
            f"{key} ({there} in the checkpoint, {here} now)"
            for key, (there, here) in differing.items()
        ]
        raise ValueError(f"{path} is from a run with other settings: {', '.join(told)}")
    return path, state


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of each setting that decides the result and differs, both values."""
    a, b = result_settings(one), result_settings(other)
    values = {key: (a.get(key, "absent"), b.get(key, "absent")) for key in sorted(a.keys() | b)}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def check_precision(state: dict[str, Any], precision: str, asked: str, folder: Path) -> None:
    """Raise ValueError unless the run of ``state`` trains in ``precision``, as it did before.

    ``precision`` is what the setting ``asked`` stands for on this machine.
    """
    before = state["segments"][-1]["precision"] if state["segments"] else precision
    if before != precision:
        raise ValueError(
            f"precision={asked} is {precision} here, but the run was trained in {before}; "
            f"precision={precision_name(before)} {shell_override('run_dir', folder)} resume=auto "
            "continues it"
        )


def runs_with_other_epochs(folder: Path, config: dict[str, Any]) -> list[str]:
    """Of each finished run beside ``folder`` that differs in its epochs alone, how to go on."""
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
    """Put ``stateful`` where the state from ``path`` left it.

    Random numbers have no state to keep: those of an epoch and those of a step begin anew, from the
    seed.

    Raises:
        UnreadableError: the state does not fit, being of another version of the code or damaged.
    """
    try:
        for name, part in stateful.items():
            if name not in state:
                raise KeyError(f"{name} is missing")
            if isinstance(part, nn.Module):  # numbers that are not finite end the run by themselves
                tensors = named_tensors(state[name], name)
                check_tensors(tensors, part.state_dict(), name, "this run's network", finite=False)
                part.load_state_dict(tensors)
                continue
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                _check_shapes(part)
    except Exception as error:  # whatever torch meets in what is damaged
        raise UnreadableError(f"{path} {OTHER_CODE}: {one_line(error)}") from error


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnreadableError unless each average of the optimizer is of its parameter's shape."""
    for parameter, averages in optimizer.state.items():
        for name, value in averages.items():
            shape = getattr(value, "shape", ())
            if shape not in ((), parameter.shape) or not isinstance(value, Tensor | None):
                raise UnreadableError(f"optimizer: {name} is {tuple(shape)} of {parameter.shape}")


# ---- A run ---------------------------------------------------------------------------------------


def _check_summary(folder: Path) -> None:
    """Raise ValueError if ``folder``, whose run has taken all its epochs, has a damaged summary."""
    try:
        run_folder.read_summary(folder)
    except FileNotFoundError:
        return
    except UnreadableError as error:
        raise ValueError(f"{error}; without that file resume=auto writes it again") from error


def is_in(file: Path, folder: Path) -> bool:
    """Whether the checkpoint ``file`` is the folder's own."""
    return file.parent.resolve() == folder.resolve()


def finished_before(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The summary, which stays as it is, if ``folder`` holds the finished run; else None.

    Its checkpoints do not matter any more: they may be damaged or deleted.

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
    differing.pop("precision", None)  # which may have been called otherwise
    if differing or images.differ(summary.get("data_digest"), config):
        return None  # the run itself says so
    log.info("already finished: %s: %s", run_folder.scores_line(summary), folder)
    return {**summary}


def continue_run(
    state: RunState,
    resumed: Path | None,
    saved: dict[str, Any],
    run_dir: Path,
    config: dict[str, Any],
) -> Progress:
    """The progress of a new run, or ``state`` and progress as the checkpoint has them.

    What ``resume=auto`` has found, or has not, is logged.

    Raises:
        ValueError: the checkpoint was written by a different version of this code.
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
