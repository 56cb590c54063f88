"""The components that train.py uses, each against its documentation."""

import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training import provenance
from training.device import choose_device, choose_dtype, peak_memory_mib, to_device
from training.schedule import constant, one_cycle, step, warmup_cosine
from training.scores import evaluate

from helpers import ROOT

# ---- schedule -----------------------------------------------------------------------------------


def rates(make, steps, **settings):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = make(optimizer, steps, **settings)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warmup_cosine():
    seen = rates(warmup_cosine, 40, warmup=0.25)
    assert seen[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert seen[10:] == pytest.approx(
        [0.2 * (1 + math.cos(math.pi * i / 30)) for i in range(30)], abs=1e-12
    )


def test_one_cycle():
    seen = rates(one_cycle, 41, warmup=0.25, start=0.1, end=0.01)
    assert seen[0] == pytest.approx(0.04)
    assert seen[10] == max(seen) == pytest.approx(0.4)
    assert seen[40] == pytest.approx(0.004)
    assert seen[5] == pytest.approx((0.04 + 0.4) / 2)
    assert seen[25] == pytest.approx((0.4 + 0.004) / 2)
    assert seen[:11] == sorted(seen[:11])
    assert seen[10:] == sorted(seen[10:], reverse=True)


def test_step_and_constant():
    seen = rates(step, 20, milestones=[0.75, 0.5], factor=0.1, warmup=0.2)
    assert seen[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert seen[4:10] == pytest.approx([0.4] * 6)
    assert seen[10:15] == pytest.approx([0.04] * 5)
    assert seen[15:] == pytest.approx([0.004] * 5)
    assert rates(constant, 20, warmup=0.2) == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 17)
    assert rates(constant, 5, warmup=0.0) == [0.4] * 5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_hardly_any_steps(steps):
    for seen in (
        rates(warmup_cosine, steps, warmup=0.05),
        rates(one_cycle, steps, warmup=0.25, start=0.1, end=0.01),
        rates(one_cycle, steps, warmup=1.0, start=0.1, end=0.01),
        rates(step, steps, milestones=[0.5], factor=0.1, warmup=0.5),
    ):
        assert all(0 <= rate <= 0.4 for rate in seen)


# ---- scores -------------------------------------------------------------------------------------


def test_evaluate_counts_every_image_once_and_leaves_no_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Dropout(0.5))
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(6, (23,))
    batches = zip(images.split(5), labels.split(5), strict=True)
    scores, per_class = evaluate(model, batches, torch.autocast("cpu", enabled=False))
    logits = model[1](images.flatten(1))
    rank = [(row > row[label]).sum().item() for row, label in zip(logits, labels, strict=True)]
    assert scores["top1"] == pytest.approx(100 * sum(r < 1 for r in rank) / 23)
    assert scores["top5"] == pytest.approx(100 * sum(r < 5 for r in rank) / 23)
    for label in range(6):
        ranks = [r for r, its in zip(rank, labels.tolist(), strict=True) if its == label]
        assert per_class[label] == pytest.approx(100 * sum(r < 1 for r in ranks) / len(ranks))
    assert per_class[6:] == [None]  # no images with this label
    log_likelihood = [
        row[label] - row.exp().sum().log() for row, label in zip(logits, labels, strict=True)
    ]
    assert scores["loss"] == pytest.approx(-sum(log_likelihood).item() / 23, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


# ---- device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_auto_on_the_cpu(monkeypatch, units):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == units, raising=False)
    device = choose_device("cpu")
    assert choose_dtype("auto", device) == (torch.bfloat16 if units else torch.float32)
    assert choose_dtype("bf16", device) == torch.bfloat16
    assert choose_dtype("fp16", device) == torch.float16
    assert peak_memory_mib(device) > 10


@pytest.mark.parametrize(("name", "asked"), [("cuda", ["high"]), ("cpu", [])])
def test_float32_is_tf32_on_a_gpu_in_training_and_evaluation(monkeypatch, name, asked):
    """Both use `to_device`, so this can be tested without a GPU."""
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    to_device(SimpleNamespace(to=lambda *_, **__: None), torch.device(name), channels_last=False)
    assert said == asked


@pytest.mark.slow
def test_peak_memory_is_this_process_own():
    """A small process started by one that had a large peak does not report that peak."""
    hoard = torch.ones(2**27)  # 512 MiB
    code = "import torch; from training.device import peak_memory_mib as p; "
    code += "print(p(torch.device('cpu'))); x = torch.ones(2**25); print(p(torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after = map(float, done.stdout.split())
    assert before < peak_memory_mib(torch.device("cpu")) - hoard.nbytes / 2**20 / 2
    assert 100 < after - before < 200  # 128 MiB


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_auto_on_a_gpu(monkeypatch, has_bf16, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    monkeypatch.setattr(torch.cuda, "device", lambda d: asked.append(d) or nullcontext())
    gpu = torch.device("cuda:1")
    assert choose_dtype("auto", gpu) == getattr(torch, expected)
    if not has_bf16:
        with pytest.raises(ValueError, match=r"precision=bf16.*use precision=fp16"):
            choose_dtype("bf16", gpu)
    assert set(asked) == {gpu}  # not the current device


@pytest.mark.parametrize("name", ["cuda:99", "mps:0", "gpu", ""])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"device={name}"):
        choose_device(name)


@pytest.mark.parametrize(("name", "current"), [("cuda", []), ("cuda:1", [1])])
def test_the_gpu_that_is_asked_for_is_the_current_one(monkeypatch, name, current):
    """`set_seed` seeds the current GPU, and its memory is reported."""
    made = []
    monkeypatch.setattr("training.device._check_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(device.index))
    assert choose_device(name) == torch.device(name)
    assert made == current


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_found():
    assert choose_device("auto").type == "cuda"
    assert provenance.hardware(torch.device("cuda")) == torch.cuda.get_device_name()


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def repository(folder):
    """Make a repository with one file; return its commit."""
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "file").write_text("1")
    git(folder, "init", "-q")
    git(folder, "add", "training")
    git(folder, "commit", "-q", "-m", folder.name)
    return git(folder, "rev-parse", "HEAD")


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
@pytest.mark.parametrize(
    "names", [[], ["GIT_DIR"], ["GIT_DIR", "GIT_WORK_TREE"], ["GIT_INDEX_FILE"], ["GIT_COMMON_DIR"]]
)
def test_the_commit_is_the_projects_own(tmp_path, monkeypatch, names):
    outer = repository(tmp_path / "other")
    root = tmp_path / "other" / "project"
    own = repository(root)
    assert own != outer
    monkeypatch.setattr(provenance, "__file__", str(root / "training" / "provenance.py"))
    other = tmp_path / "other"
    values = {
        "GIT_DIR": other / ".git",
        "GIT_WORK_TREE": other,
        "GIT_INDEX_FILE": other / ".git" / "no-index",
        "GIT_COMMON_DIR": other / ".git",
    }
    for name in names:
        monkeypatch.setenv(name, str(values[name]))
    assert provenance.commit() == own
    assert provenance.uncommitted() == b""
    (root / "training" / "file").write_text("2")
    assert provenance.commit() == f"{own}-dirty"
    assert provenance.uncommitted().startswith(b"diff --git a/training/file b/training/file\n")
    monkeypatch.setattr(provenance, "MAX_DIFF", 40)
    assert provenance.uncommitted().startswith(b" training/file | ")
    assert len(provenance.uncommitted()) <= 40
    (root / ".git").rename(tmp_path / "elsewhere")  # like an unpacked archive
    assert provenance.commit() == "unknown"
    (root / ".git").write_text(f"gitdir: {tmp_path / 'elsewhere'}\n")  # like a worktree
    assert provenance.commit() == f"{own}-dirty"


def test_provenance():
    assert provenance.versions()["torch"] == torch.__version__
    assert "threads" in provenance.hardware(torch.device("cpu"))
