"""The dashboard's workspace: each of its keys is recorded by a run, and it can be saved."""

import itertools
import json
import re

import pytest

import train
from reporting import dashboard, workspace
from reporting.analysis import analyze
from scripts.workspace import augmented_blocks
from training.compose import compose_config
from training.tracking import CHARTS

from app import run_app
from folders import make_run
from helpers import ROOT, TINY, offline_records

BLOCKS = ["stages.1.0.conv1", "stages.2.0.conv1"]  # augmented blocks of TINY
WEAVE, VEGA = "Weave", "Vega2"


def spec_of(*arguments, **more):
    return json.loads(workspace.as_json(workspace.build("aaconv", "me", *arguments, **more)))


def panels_of(spec):
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def texts(value):
    """Yield all strings in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)


def keys_of(panel):
    """Yield what a panel shows, as ("config", "history" or "summary", key)."""
    config = panel["config"]
    for text in texts(config):
        if found := re.fullmatch(r"config:(.+)\.value|\$\{config:(.+)\}", text):
            yield "config", found[1] or found[2]
        elif text.startswith("summary:"):
            yield "summary", text.removeprefix("summary:")
        elif panel["viewType"] in (WEAVE, VEGA) and text.startswith(("media/", "compare/")):
            yield "summary", text
    for name in [*config.get("metrics", []), *config.get("mediaKeys", [])]:
        yield "history", name
    if "groupBy" in config:
        yield "config", config["groupBy"].removesuffix(".value")
        yield "history", config["xAxis"]
    if "targetKey" in config:
        yield "summary", config["targetKey"]


@pytest.fixture
def recorded(settings, tmp_path):
    """The keys that runs of a comparison and of a sweep, and the compare run, record."""
    online = ["wandb.mode=offline", "epochs=1"]
    base = [word for word in TINY if "tracking" not in word]
    for number, word in enumerate(("data.val_size=0", "data.val_size=40")):
        cfg = settings("attention=aa", word, *online, base=base)
        train.train(cfg, tmp_path / str(number))
    for seed in range(2):
        make_run(tmp_path / "compared" / f"plain{seed}", seed=seed)
        for dk, heads in itertools.product((8, 16), (2, 4)):
            run_dir = tmp_path / "compared" / f"aa{dk}{heads}{seed}"
            own = {"attention__dk": dk, "attention__Nh": heads}
            make_run(run_dir, attention="aa", seed=seed, **own)
    report = tmp_path / "report.html"
    report.write_text("a report")
    dashboard.post(
        analyze([tmp_path / "compared"]),
        report,
        out_dir=tmp_path,
        group="compared",
        project="aaconv",
        entity=None,
        mode="offline",
    )
    kept = {"config": set(), "history": set(), "summary": set(), "data": set()}
    for record in offline_records(tmp_path):
        if record["type"] == "run":
            update = record["run"]["config"]["update"]
            kept["config"] |= update.keys()
            kept["data"].add(str(update.get("data")).strip(chr(34)))
        if record["type"] == "history":
            kept["history"] |= record["history"]["item"].keys()
        if record["type"] == "summary":
            kept["summary"] |= record["summary"]["update"].keys()
    # Pictures and tables are stored under several keys.
    return {kind: {str(key).removesuffix("._type") for key in keys} for kind, keys in kept.items()}


@pytest.mark.slow
def test_every_key_of_the_panels_is_recorded(recorded):
    shown = [(kind, key) for panel in panels_of(spec_of(BLOCKS)) for kind, key in keys_of(panel)]
    assert len(set(shown)) > 20
    for kind, key in shown:
        assert key in recorded[kind], (kind, key)
    assert recorded["data"] == {"lookup", "cifar100"}  # the two runs and the compare run


def test_what_is_shown():
    spec = spec_of(BLOCKS)
    panels = panels_of(spec)
    by_type = {}
    for panel in panels:
        by_type.setdefault(panel["viewType"], []).append(panel["config"])
    axes = [config["columns"] for config in by_type["Parallel Coordinates Plot"]]
    for columns, on in zip(axes, ("val", "test"), strict=True):
        assert [column["accessor"] for column in columns] == [
            "config:attention.dk.value",
            "config:attention.dv.value",
            "config:attention.Nh.value",
            "config:optim.lr.value",
            f"summary:{on}/top1",
        ]
    important = [config["targetKey"] for config in by_type["Parameter Importance"]]
    assert important == ["val/top1", "test/top1"]
    for config in by_type["Run History Line Plot"]:
        assert (config["groupBy"], config["groupAgg"]) == ("variant.value", "mean")
        assert (config["groupArea"], config["xAxis"]) == ("minmax", "epoch")
    cost = [(config["xAxis"], config["yAxis"]) for config in by_type["Scatter Plot"]]
    assert ("config:network.flops.value", "summary:test/top1") in cost
    media = [key for config in by_type["Media Browser"] for key in config["mediaKeys"]]
    assert [f"media/attention/{name}" for name in BLOCKS] == media[3:]
    charts = {config["panelDefId"]: config["fieldSettings"] for config in by_type[VEGA]}
    assert charts == {preset.name: preset.fields for preset in CHARTS.values()}
    assert len({panel["__id__"] for panel in panels}) == len(panels)


def test_runs_on_other_data_are_left_out_when_asked_for():
    def filters(spec):
        (runs,) = spec["section"]["runSets"]
        return [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]]

    assert filters(spec_of(BLOCKS)) == []
    assert filters(spec_of(BLOCKS, data="cifar10")) == [("data", "cifar10")]


def test_the_blocks_are_those_of_the_network():
    assert augmented_blocks(TINY) == BLOCKS
    assert augmented_blocks(["attention=none"]) == []
    depths = compose_config(["model=resnet20"]).model.depths
    names = augmented_blocks(["model=resnet20", "attention.stages=[3]", "attention.min_dkh=1"])
    assert len(names) == depths[2]


def call(server, *words, **environment):
    command = [ROOT / "scripts" / "workspace.py", *words]
    return run_app(command, env=server.environment | environment)


@pytest.mark.slow
def test_it_is_saved_and_replaced(server):
    first = call(server, "--save", "--project", "mine")
    assert first.returncode == 0, first.stderr
    url = first.stdout.strip()
    assert "/me/mine?nw=" in url
    again = call(server, "--save", "--project", "mine", "--data", "cifar10", "--replace", url)
    assert again.stdout.strip() == url, again.stderr
    (view,) = server.views.values()
    assert (view["entityName"], view["projectName"]) == ("me", "mine")
    assert view["displayName"] == f"{workspace.NAME} (cifar10)"
    assert len(panels_of(json.loads(view["spec"]))) > 10
    other = call(server, "--save", "--project", "other", "--replace", url)
    assert other.returncode == 1
    assert other.stderr == f"workspace.py: not saved: {url} belongs to me/mine, not to me/other\n"
    assert len(server.views) == 1
    assert call(server, "--save", "--project", "mine").stdout.strip() != url
    assert len(server.views) == 2


@pytest.mark.slow
def test_without_a_server_it_is_shown_and_not_saved(server, tmp_path):
    server.kill()
    shown = call(server, WANDB_API_KEY="", HOME=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert len(panels_of(json.loads(shown.stdout))) > 10
    nobody = call(server, "--save", WANDB_API_KEY="", HOME=str(tmp_path), NETRC="none")
    assert nobody.returncode == 2
    assert nobody.stderr == ("workspace.py: no account to save it with; run `wandb login` first\n")
    wrong = call(server, "--", "model=resnet2")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "model/resnet2" in wrong.stderr
    dead = call(server, "--save")
    assert dead.returncode == 1
    assert dead.stderr.startswith("workspace.py: not saved: ")
    assert dead.stderr.count("\n") == 1
