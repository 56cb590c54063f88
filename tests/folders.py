"""Made-up run folders that look like those of train.py."""

import csv
import json
import math
import random

from models import ATTENTIONS
from reporting import runs
from reporting.analysis import Analysis, analyze
from reporting.render import write

CLASSES = ["apple", "aquarium_fish", "bear", "maple_tree", "pickup_truck", "<rocket>", "sea"]
TARGETS = {name: kind.__name__ for name, kind in ATTENTIONS.items()}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Unusual but valid names, which must be shown literally and never interpreted.
NASTY = [
    "<img src=x onerror=alert(1)>",
    "a|b",
    "`code`",
    "*bold*",
    "_x_",
    "__init__",
    "[link](http://example.com)",
    "![picture](x.svg)",
    "&lt;&amp;",
    "first\nsecond\r\n\r\n# third",
    "~~struck~~",
    "$formula$",
    "back\\slash\\|",
    "www.example.com a@example.com",
    "\x1b[31mred\x07",
    "\u202eright to left",
    "Größe 大きさ",
    "\ud800",
    "</details>",
    "{{ title }}{% raw %}",
]


def segment(first_epoch=1, **facts):
    """Return an entry of a summary's segments; ``facts`` override it, ``torch`` the version."""
    versions = {"python": "3.11.7", "torch": facts.pop("torch", "2.13.0")}
    return {
        "first_epoch": first_epoch,
        "commit": COMMIT,
        "versions": versions,
        "hardware": "Some GPU",
        "precision": "bfloat16",
        "processes": 1,
        **facts,
    }


def make_run(
    folder,
    top1=70.0,
    seed=0,
    attention="none",
    *,
    epochs=3,
    classes=CLASSES,
    finished=True,
    evaluated_on="test",
    facts=(),
    known=(),
    **overrides,
):
    """Write a run; ``overrides`` are settings with "__" for a dot, ``facts`` override the summary.

    ``known`` are additional keys of the summary, which not every version of the code writes. Facts
    that are not keys of the summary (commit, hardware, ...) go to its only segment.
    """
    config = {
        "model": {"name": "wrn16_4", "depths": [2, 2, 2], "aa": {"dk": 0.2}},
        "attention": {"_target_": f"models.{TARGETS[attention]}"},
        "data": {"_target_": "data.load_cifar", "name": "cifar100", "root": "r"},
        "augmentation": {"_target_": "data.Augmentation", "crop_pad": 4},
        "optim": {"_target_": "torch.optim.SGD", "lr": 0.2, "weight_decay": 5e-4},
        "schedule": {"_target_": "training.schedule.one_cycle", "warmup": 0.2},
        "wandb": {"mode": "disabled"},
        "name": "short",
        "out_dir": str(folder),
        "seed": seed,
        "epochs": epochs,
        "batch_size": 256,
    }
    if attention == "aa":
        config["attention"] |= {"dk": 0.2, "dv": 0.1, "Nh": 8, "position": "relative"}
    for key, value in overrides.items():
        *groups, last = key.split("__")
        parent = config
        for name in groups:
            parent = parent[name]
        parent[last] = value
    draw = random.Random(f"{attention} {seed} {top1}")
    rows = []
    for epoch in range(1, epochs + 1):
        missing = (top1 - 5) * math.exp(-6 * epoch / epochs) * (epoch < epochs)
        rows.append(
            {
                "epoch": epoch,
                "train/loss": 4.6 * math.exp(-2 * epoch / epochs) + draw.random() / 9,
                "train/top1": min(100.0, top1 - missing + 4),
                "train/other": float(epoch),
                "train/lr": 0.1,
                f"{evaluated_on}/loss": 4.6 * math.exp(-1.5 * epoch / epochs),
                f"{evaluated_on}/top1": top1 - missing,
                f"{evaluated_on}/top5": min(100.0, top1 - missing + 20),
                **({"attention/entropy": 0.5 + 0.1 * seed / epoch} if attention == "aa" else {}),
                "perf/images_per_s": 5e4 / 12,
                "perf/peak_memory_mib": 900.0,
                "perf/epoch_seconds": 12.0 if attention == "none" else 15.0,
            }
        )
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    by_class = [min(100.0, max(0.0, top1 + draw.gauss(0, 6))) for _ in classes]
    last = rows[-1]
    summary = {
        "format": 3,
        "epochs": epochs,
        "seed": seed,
        **{key: last[key] for key in last if key.startswith(("train/", f"{evaluated_on}/"))},
        "perf/total_seconds": sum(row["perf/epoch_seconds"] for row in rows),
        "per_class_top1": by_class,
        "class_names": list(classes),
        "model": config["model"]["name"],
        "attention": attention,
        "data": config["data"]["name"],
        "evaluated_on": evaluated_on,
        "parameters": {"none": 2_750_000, "aa": 2_700_000}.get(attention, 2_780_000),
        "flops": {"none": 776_000_000, "aa": 1_110_000_000}.get(attention, 777_000_000),
        "segments": [segment()],
        "config": config,
        **dict(known),
    }
    facts = dict(facts)
    summary |= {key: facts.pop(key) for key in list(facts) if key in summary}
    if facts:
        summary["segments"] = [segment(**facts)]
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def variants_of(root):
    """Return the variants of the runs below ``root``, on any data set."""
    found, _ = runs.read([root])
    return runs.group_by_variant(found)[0]


def analysis_of(root):
    """Return the analysis of the runs below ``root``, all of which are on CIFAR-100."""
    return Analysis("cifar100 test", variants_of(root), [])


def failed(folder, error="the loss is not finite at epoch 2"):
    """Make ``folder`` look like that of a diverged run."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": 3, "error": error})
    (folder / "failed.json").write_text(text, encoding="utf-8")
    return folder


def nasty_runs(root):
    """Write runs that have all nasty names in every text of their files and folder names."""
    whole = " ".join(NASTY)
    facts = {"model": whole, "class_names": NASTY, "per_class_top1": [50.0] * len(NASTY)}
    moved = [segment(), segment(2, commit=whole, hardware=whole, precision=whole, torch=whole)]
    for number, attention in enumerate(("none", "aa", "aa")):
        settings = {"attention__dk": whole} if number == 2 else {}
        settings |= {"optim__momentum": whole} if number else {}
        make_run(
            root / f"{number}",
            70.0 + number,
            attention=attention,
            facts=facts | {"segments": moved},
            optim__nesterov={whole: whole},
            **settings,
        )
    make_run(root / "other", model__name=whole, facts={"model": "_x_"})
    failed(root / "failed <b>|`*_x_*`\n[a](b)", whole)


def report(folders, out, data=None):
    """Write the report on ``folders`` to ``out``; return its summary for a terminal."""
    return write(analyze(folders, data), out)
