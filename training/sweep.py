"""The jobs of ``train.py -m``: which can be trained, and what became of each.

A job that fails or diverges never ends the sweep. What no machine could train is named before the
first job begins; with ``resume=auto`` the jobs that have a result already, a bad one included, are
not begun again.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

from training import cli, console, outcome, run_folder, settings
from training.distributed import await_main, broadcast_from_main, process_group, world
from training.files import write_text
from training.kinds import UnreadableError
from training.tracking import OF_ONE_RUN
from training.variants import result_settings


@dataclass(eq=False)
class Job:
    """One combination of the sweep's settings: its overrides, its run's folder, its outcome."""

    number: int
    words: list[str]
    cfg: DictConfig
    folder: Path
    own_folder: bool  # whether the user chose hydra.sweep.subdir
    outcome: str = outcome.NOT_BEGUN
    why: str = ""

    def end(self, outcome: str, why: str) -> None:
        """Note what has become of it, and why in one line."""
        self.outcome, self.why = outcome, why


# ---- Before the first job -----------------------------------------------------------------------


def plan(all_words: Sequence[list[str]], load: Callable[[list[str]], DictConfig]) -> list[Job]:
    """The jobs, those that cannot be trained refused, and those with a result skipped.

    ``load`` composes the settings of a job.

    Raises:
        HydraException, OmegaConfBaseException: settings that train.py does not have.
        SystemExit: none of the jobs can be trained (code 2); the line is printed.
    """
    jobs = [_job(number, words, load(words)) for number, words in enumerate(all_words)]
    for job in jobs:
        try:
            settings.check(job.cfg, world().size)
        except ValueError as error:
            job.end(outcome.REFUSED, console.one_line(error))
    if all(job.outcome == outcome.REFUSED for job in jobs):
        reasons = {job.why for job in jobs}
        more = f"; none of the {len(jobs)} jobs can be trained" if len(reasons) > 1 else ""
        cli.stop(f"{jobs[0].why}{more}")
    # The main process alone looks, and so all of several begin the same jobs.
    with process_group():
        for job, found in zip(jobs, broadcast_from_main(lambda: _look(jobs)), strict=True):
            job.end(*found)
    return jobs


def _job(number: int, words: list[str], config: DictConfig) -> Job:
    with open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    with _as_hydras(config):
        sweep = config.hydra.sweep
        output_dir = Path(os.path.abspath(Path(str(sweep.dir), str(sweep.subdir))))
        cfg = copy.deepcopy(config)
        with open_dict(cfg):
            del cfg["hydra"]
        return Job(number, words, cfg, cli.run_dir(cfg, output_dir), sweep.subdir != ".")


@contextmanager
def _as_hydras(config: DictConfig) -> Iterator[None]:
    # The settings may refer to hydra's by the resolver ``${hydra:...}``, as in a job.
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _look(jobs: list[Job]) -> list[tuple[str, str]]:
    """The jobs' outcomes, after a look at their folders."""
    for job in jobs:
        if job.outcome == outcome.NOT_BEGUN and job.cfg.resume == "auto" and not job.cfg.overwrite:
            _skip_if_there(job)
    return [(job.outcome, job.why) for job in jobs]


def _skip_if_there(job: Job) -> None:
    """Note the result of a job that has one, good or bad; it would train nothing."""
    try:
        failure = run_folder.read_failure(job.folder)
        if failure is not None:
            job.end(outcome.DIVERGED, f"{failure} (before; overwrite=true trains it again)")
            return
        summary = run_folder.read_summary(job.folder)
    except (FileNotFoundError, UnreadableError):
        return  # the job itself says what is wrong
    if result_settings(summary["config"]) == result_settings(settings.resolve(job.cfg)):
        job.end(outcome.SKIPPED, f"finished before: {run_folder.scores_line(summary)}")


# ---- The jobs -----------------------------------------------------------------------------------


def run(
    jobs: list[Job],
    config: DictConfig,
    launch: Callable[..., Sequence[JobReturn]],
    *,
    one_by_one: bool,
    at_once: int | None = None,
) -> list[JobReturn]:
    """Train what is missing, print the table, and return what ``launch`` has for each job.

    ``launch`` is that of Hydra's launcher, which is given a job after the other with
    ``one_by_one``, else ``at_once`` of them together (None: all).

    Raises:
        SystemExit: a job has no result (code 1); a signal or the end of the time stopped one.
    """
    for job in jobs:
        if job.outcome == outcome.REFUSED:
            _tell(job, jobs)
    # A launcher numbers what it is given; folders that the user names by it must stay the same.
    all_of_them = not one_by_one and any(job.own_folder for job in jobs)
    left = [job for job in jobs if job.outcome == outcome.NOT_BEGUN or all_of_them]
    if left and world().is_main:
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "multirun.yaml", OmegaConf.to_yaml(config))
    for name in OF_ONE_RUN:
        os.environ.pop(name, None)
    results: list[JobReturn] = []
    code = None
    try:
        size = 1 if one_by_one else at_once or max(1, len(left))
        for first in range(0, len(left), size):
            if one_by_one:
                _head(left[first], jobs)
            results += _launch(left[first : first + size], launch)
    except SystemExit as stopped:  # of a job in this process
        code = stopped.code
    except KeyboardInterrupt:
        code = 130
    finally:
        if world().is_main:
            print("\n" + "\n".join(table(jobs)), flush=True)
        await_main()
    bad = any(job.outcome in outcome.BAD for job in jobs)
    if code is not None or bad:
        raise SystemExit(code or int(bad))
    return results


def _launch(jobs: list[Job], launch: Callable[..., Sequence[JobReturn]]) -> Sequence[JobReturn]:
    # Others are there for their number only: they end at once, and their outcome is known.
    begun = [job for job in jobs if job.outcome == outcome.NOT_BEGUN]
    try:
        results = launch([job.words for job in jobs], initial_job_idx=jobs[0].number)
    except BaseException as error:  # a job's process died, or was told to stop
        for job in begun:
            _read_outcome(job, error)
        if not isinstance(error, Exception):
            raise
        return []
    for job, result in zip(jobs, results, strict=True):
        if job in begun:
            _note(job, result)
    return results


def _note(job: Job, result: JobReturn) -> None:
    returned = result._return_value  # the property raises what is a failure
    if result.status == JobStatus.COMPLETED:
        job.end(outcome.DONE, f"top-1 {returned:.2f}")
    elif isinstance(returned, outcome.JobError):
        job.end(*returned.args)
    else:
        job.end(outcome.FAILED, cli.explain(returned))


def _read_outcome(job: Job, error: BaseException) -> None:
    """What the run's folder says of a job whose launcher has nothing to say."""
    try:
        failure = run_folder.read_failure(job.folder)
        if failure is not None:
            job.end(outcome.DIVERGED, failure)
            return
        job.end(outcome.DONE, run_folder.scores_line(run_folder.read_summary(job.folder)))
    except (FileNotFoundError, UnreadableError):
        if isinstance(error, SystemExit | KeyboardInterrupt):
            job.end(outcome.STOPPED, "resume=auto continues it")
        else:
            job.end(outcome.FAILED, cli.explain(error))


# ---- What is said of them -----------------------------------------------------------------------


def _head(job: Job, jobs: list[Job]) -> None:
    if world().is_main:
        print(f"\njob #{job.number} of {len(jobs)}: {_label(job, jobs)}", flush=True)


def _tell(job: Job, jobs: list[Job]) -> None:
    if world().is_main:
        console.tell("train.py", f"job #{job.number} ({_label(job, jobs)}) is not run: {job.why}")


def table(jobs: list[Job]) -> list[str]:
    """The jobs with the settings that tell them apart and their outcomes, and the counts."""
    labels = [_label(job, jobs) for job in jobs]
    width = max(map(len, labels))
    lines = [
        f"#{job.number:<4} {label:<{width}}  {job.outcome}{': ' if job.why else ''}{job.why}"
        for job, label in zip(jobs, labels, strict=True)
    ]
    ends = [job.outcome for job in jobs]
    counts = [f"{ends.count(end)} {end}" for end in outcome.ALL if end in ends]
    count = f"{len(jobs)} job{'s' if len(jobs) > 1 else ''}: {', '.join(counts)}"
    if not set(ends).isdisjoint(outcome.TO_BE_CONTINUED):
        count += "; the same command with resume=auto trains what is missing"
    return [*lines, count]


def _label(job: Job, jobs: list[Job]) -> str:
    """Those of the job's overrides that not all jobs have."""
    common = set.intersection(*(set(other.words) for other in jobs)) if len(jobs) > 1 else set()
    return " ".join(word for word in job.words if word not in common)
