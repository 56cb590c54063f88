"""Sweeps and runs as jobs of a real one-node Slurm that is started for these tests."""

import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from helpers import ROOT, TINY, await_, free_ports, machine_lacks, rows

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
GUARD = 180  # seconds; only guards against hanging, does not test speed

pytestmark = pytest.mark.thorough

# No authentication and no accounting; everything is in one folder and runs as the current user.
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobRequeue=1
KillWait=10
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A function that runs a command with the environment of this Slurm."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        lacking = ", ".join(missing)
        machine_lacks(f"no {lacking} in PATH (Debian: slurmctld, slurmd, slurm-client)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    user, host = getpass.getuser(), socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(folder=folder, ports=free_ports(2), user=user, host=host))
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {"SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1"}

    def start(*words):
        with (folder / f"{words[0]}.out").open("w") as out:
            return subprocess.Popen(words, env=env, stdout=out, stderr=out)

    def call(*words):
        return subprocess.run(
            words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=GUARD, check=False
        )

    daemons = [start("slurmctld", "-D"), start("slurmd", "-D", "-N", "localhost")]
    try:
        await_(lambda: "idle" in call("sinfo", "-h").stdout, "an idle node")
        yield call
        call("scancel", "--user", user)
    finally:
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(GUARD)


SUBMITIT = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=null",
]


def test_a_sweep_of_slurm_jobs_runs_to_its_end(cluster, tmp_path):
    """Two jobs are rejected, one diverges, one succeeds; running it again repeats none."""
    words = ["train.py", "-m", *SUBMITIT, *TINY, "attention=aa", f"out_dir={tmp_path}"]
    words += ["epochs=1", "attention.dk=0.5,9.0", "optim.lr=0.1,1e20"]
    said = cluster(sys.executable, *words)
    assert said.returncode == 1, said.stderr
    assert re.search(r"^4 jobs: 1 done, 1 diverged, 2 refused$", said.stdout, re.M), said.stdout
    assert "Traceback" not in said.stdout + said.stderr
    (summary,) = tmp_path.rglob("summary.json")
    before = summary.read_bytes()
    again = cluster(sys.executable, *words, "resume=auto")
    assert again.returncode == 1, again.stderr
    assert re.search(r"^4 jobs: 1 skipped, 1 diverged, 2 refused$", again.stdout, re.M), (
        again.stdout
    )
    assert summary.read_bytes() == before


JOB = """#!/bin/sh
#SBATCH --job-name=aaconv --ntasks=1 --requeue --open-mode=append
srun {python} train.py {words} resume=auto
"""


def test_a_signalled_job_queues_itself_again_and_ends_with_the_rows_of_one_run(cluster, tmp_path):
    """SIGUSR1 saves and requeues the job; its second start resumes from that step."""

    def job_words(name):
        return [*TINY, "epochs=25", f"out_dir={tmp_path / name}"]

    whole = cluster("srun", "-n1", sys.executable, "train.py", *job_words("whole"))
    assert whole.returncode == 0, whole.stderr
    script, log = tmp_path / "job.sh", tmp_path / "job.log"
    script.write_text(JOB.format(python=sys.executable, words=shlex.join(job_words("cut"))))
    job = cluster("sbatch", "--parsable", f"--output={log}", str(script)).stdout.strip()

    def state():
        return re.search(r"JobState=(\w+)", cluster("scontrol", "show", "job", job).stdout)[1]

    def lines():
        return [n for t in tmp_path.glob("cut/**/metrics.csv") for n in t.read_text().splitlines()]

    await_(lambda: len(lines()) > 2, "two epochs")
    cluster("scancel", "--signal=USR1", job)
    await_(lambda: state() == "PENDING", "the job in the queue again")
    assert 2 < len(lines()) < 26, "the signal came too late to try anything"
    assert not list(tmp_path.glob("cut/**/summary.json"))
    # Slurm would wait two minutes; slurmd mistakes a start in the same second for the killed job.
    cluster("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    await_(lambda: state() not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job")
    assert state() == "COMPLETED"
    first, second = (next(tmp_path.glob(f"{n}/**/summary.json")).parent for n in ("whole", "cut"))
    assert len(rows(first)) == 25
    assert rows(second) == rows(first)
    assert "Restarts=1" in cluster("scontrol", "show", "job", job).stdout
    assert "Traceback" not in log.read_text()


def test_tasks_of_srun_without_torchrun_are_refused_by_name(cluster, tmp_path):
    words = [sys.executable, "train.py", *TINY, f"out_dir={tmp_path}"]
    said = cluster("srun", "-n2", *words)
    assert said.returncode != 0
    for task in range(2):
        assert f"this is task {task} of 2 of a Slurm step" in said.stderr
    assert not list(tmp_path.iterdir())
