"""Two hosts, simulated by network namespaces of this machine with a link between them."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from helpers import ROOT, TINY, await_, machine_lacks, rows

GUARD = 240  # seconds after which a process is considered hanging
HOSTS = {"10.77.0.1": 0, "10.77.0.2": 1}
EPOCHS = 3

pytestmark = pytest.mark.thorough


def ip(words, *, check=True):
    command = ["ip", *words.split()]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=GUARD)


@pytest.fixture
def hosts():
    """The names of two namespaces and of the network device in each."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    if not shutil.which("ip"):
        machine_lacks("no ip in PATH (Debian: iproute2)")
    names = [f"aaconv-{os.getpid()}-{n}" for n in HOSTS.values()]
    devices = [f"aac{os.getpid() % 10**6}{'ab'[n]}" for n in HOSTS.values()]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {devices[0]} netns {names[0]} type veth peer {devices[1]} netns {names[1]}")
        for name, device, address in zip(names, devices, HOSTS, strict=True):
            ip(f"-n {name} address add {address}/24 dev {device}")
            for it in (device, "lo"):
                ip(f"-n {name} link set {it} up")
        yield list(zip(names, devices, strict=True))
    finally:
        for name in names:
            for pid in ip(f"netns pids {name}", check=False).stdout.split():
                os.kill(int(pid), signal.SIGKILL)  # left behind by a failed test
            ip(f"netns delete {name}", check=False)


def start(hosts, folder, *overrides):
    """Start a run as a user would, with one process on each host."""
    started = []
    for rank, (name, device) in enumerate(hosts):
        launcher = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
        launcher += [f"--master_addr={next(iter(HOSTS))}", "--master_port=29577"]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, "train.py"]
        command += [*TINY, f"run_dir={folder}", f"out_dir={folder.parent}", *overrides]
        with (folder.parent / f"said-{rank}").open("w") as said:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device},
                stdout=said,
                stderr=said,
            )
        started.append(process)
    return started


def said_by(folder, rank):
    return (folder.parent / f"said-{rank}").read_text()


def test_two_hosts_give_the_curve_of_one_process(hosts, run, tmp_path):
    # SGD with a low learning rate, for the reason given in test_processes.py.
    words = ["data.test_size=41", f"epochs={EPOCHS}", "device=cpu", "optim=sgd", "optim.lr=0.003"]
    folder = tmp_path / "two"
    for rank, process in enumerate(start(hosts, folder, *words)):
        assert process.wait(GUARD) == 0, said_by(folder, rank)
    run(*words, folder="one")
    expected, got = rows(tmp_path / "one"), rows(folder)
    assert len(expected) == len(got) == EPOCHS
    for a, b in zip(expected, got, strict=True):
        for name, value in a.items():
            close = 1e-3 if name == "train/grad_norm" else 1e-4
            assert float(b[name]) == pytest.approx(float(value), rel=close, abs=close), name


def test_hosts_cut_off_from_each_other_end_with_a_line_each(hosts, tmp_path):
    folder = tmp_path / "cut"
    processes = start(hosts, folder, "epochs=100000", "device=cpu")
    table = folder / "metrics.csv"
    await_(lambda: table.exists() and len(table.read_text().splitlines()) > 2, "two epochs")
    name, device = hosts[1]
    ip(f"-n {name} link set {device} down")
    for rank, process in enumerate(processes):
        assert process.wait(GUARD) != 0
        said = said_by(folder, rank)
        assert said.count("another process has died or does not answer") == 1, said
    assert (folder / "last.pt").stat().st_size
    assert not (folder / "summary.json").exists()
