"""The rank and world size of this process, from the environment that torchrun sets."""

import os
from typing import NamedTuple


class World(NamedTuple):
    """This process's rank, the number of processes, and its rank on this machine."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, the only one that writes files and prints."""
        return self.rank == 0


def world() -> World:
    """Return this process's rank and world size, from torchrun's environment variables.

    Raises:
        ValueError: if the variables are incomplete or invalid; or if Slurm has started several
            processes without torchrun, which do not know of each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    for name, text in given.items():
        if not text.isdecimal():
            raise ValueError(f"{name}={text} in the environment must be a number, as torchrun sets")
    size = int(given.get("WORLD_SIZE", 1))
    if len(given) == len(names):
        rank, local_rank = int(given["RANK"]), int(given["LOCAL_RANK"])
        if not local_rank <= rank < size:
            raise ValueError(
                f"RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE={size} in the environment "
                "contradict each other; torchrun sets all three"
            )
        return World(rank, size, local_rank)
    if size > 1:
        missing = ", ".join(name for name in names if name not in given)
        raise ValueError(
            f"WORLD_SIZE={size} in the environment, but not {missing}; start several processes "
            "with torchrun, which sets all of them"
        )
    _refuse_slurm_tasks()
    return World(0, 1, 0)


def _refuse_slurm_tasks() -> None:
    # Of the job step, not the job: the batch script is one process, however many the job requests.
    tasks, rank = (os.environ.get(n, "") for n in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    if (tasks.isdecimal() and int(tasks) > 1) or (rank.isdecimal() and int(rank) > 0):
        of = f" of {tasks}" if tasks else ""
        raise ValueError(
            f"this is task {rank or 0}{of} of a Slurm step, which would be a run of its own; "
            "use srun --ntasks-per-node=1 torchrun --nproc_per_node=N train.py ..."
        )
