"""Run folders as train.py leaves them, made up."""

import csv
import json
import math
import random

CLASSES = ["apple", "aquarium_fish", "bear", "maple_tree", "pickup_truck", "<rocket>", "sea"]
TARGETS = {"plain": "Plain", "aa": "AA", "se": "SE", "ge": "GE"}


def make_run(
    folder,
    top1=70.0,
    seed=0,
    attention="plain",
    *,
    epochs=3,
    classes=CLASSES,
    finished=True,
    facts=(),
    **overrides,
):
    """One run; ``overrides`` are settings, "__" for a dot, and ``facts`` replace the summary's."""
    config = {
        "model": {"name": "wrn16_4", "depths": [2, 2, 2], "aa": {"dk": 0.2}},
        "attention": {"_target_": f"models.{TARGETS[attention]}"},
        "data": {"_target_": "data.load_cifar", "name": "cifar100", "root": "r", "crop_pad": 4},
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
        place = config
        for name in groups:
            place = place[name]
        place[last] = value
    draw = random.Random(f"{attention} {seed} {top1}")
    rows = []
    for epoch in range(1, epochs + 1):
        missing = (top1 - 5) * math.exp(-6 * epoch / epochs) * (epoch < epochs)
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 4.6 * math.exp(-2 * epoch / epochs) + draw.random() / 9,
                "eval_loss": 4.6 * math.exp(-1.5 * epoch / epochs),
                "top1": top1 - missing,
                "top5": min(100.0, top1 - missing + 20),
                "lr": 0.1,
                "images_per_s": 5e4 / 12,
                "peak_memory_mb": 900.0,
                "seconds": 12.0 if attention == "plain" else 15.0,
            }
        )
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    by_class = [top1 + draw.gauss(0, 6) for _ in classes]
    summary = {
        **{key: rows[-1][key] for key in ("train_loss", "eval_loss", "top1", "top5")},
        "epochs": epochs,
        "seed": seed,
        "seconds": sum(row["seconds"] for row in rows),
        "per_class_top1": by_class,
        "class_names": list(classes),
        "model": config["model"]["name"],
        "attention": attention,
        "data": config["data"]["name"],
        "evaluated_on": "test",
        "parameters": {"plain": 2_750_000, "aa": 2_700_000}.get(attention, 2_780_000),
        "flops": {"plain": 776_000_000, "aa": 1_110_000_000}.get(attention, 777_000_000),
        "precision": "bfloat16",
        "hardware": "Some GPU",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        **dict(facts),
        "config": config,
    }
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
