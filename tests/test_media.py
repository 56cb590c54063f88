"""Tables and pictures of a run for the dashboard, against counts made here."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

import train
from aaconv import AugmentedConv, attention_maps
from data import Dataset, evaluation_batches
from data.dataset import Images
from models import augmented_layers, views
from training import attention_picture, media
from training.settings import build_model
from training.tracking import CHARTS, chart_table

from helpers import TINY, offline_records, slow, thorough

PLAIN = torch.autocast("cpu", enabled=False)


class Guess(torch.nn.Module):
    """Predict the class that the first pixel of the image encodes."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        self.norm(x)
        taken = (x[:, 0, 0, 0] * 255).round().long()
        return torch.nn.functional.one_hot(taken, self.classes).float() * 3


def dataset_of(labels, guesses, classes):
    pixels = torch.zeros(len(labels), 8, 6, 3, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor(guesses, dtype=torch.uint8)
    images = Images(pixels, torch.tensor(labels))
    names = tuple(f"c{n}" for n in range(classes))
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Dataset("d", images, images, "test", classes, names, mean, std)


def test_tables_count_what_a_network_takes_images_for():
    # c0: always right; c1: of four, once c0 and twice c2; c2: never right; c3: no images
    labels = [0, 0, 1, 1, 1, 1, 2, 2, 2]
    guesses = [0, 0, 0, 2, 2, 1, 1, 1, 3]
    seen = media.final_media(Guess(4), dataset_of(labels, guesses, 4), 4, PLAIN)
    assert seen["media/classes"].rows == [["c0", 100.0, 2], ["c1", 25.0, 4], ["c2", 0.0, 3]]
    matrix = {(row[0], row[1]): row[2] for row in seen["media/confusion_matrix"].rows}
    assert len(matrix) == 16
    for a, b in matrix:
        pairs = zip(labels, guesses, strict=True)
        assert matrix[a, b] == sum((f"c{x}", f"c{y}") == (a, b) for x, y in pairs)
    for name, chart in CHARTS.items():
        assert set(chart.fields.values()) <= set(seen[name].columns)
    assert seen["media/confusion"].rows == [
        ["c2", 0.0, "c1", 66.67],
        ["c2", 0.0, "c3", 33.33],
        ["c1", 25.0, "c2", 50.0],
        ["c1", 25.0, "c0", 25.0],
    ]
    rows = seen["media/predictions"].rows
    assert [row[1:3] for row in rows] == [
        [f"c{a}", f"c{b}"] for a, b in zip(labels, guesses, strict=True)
    ]
    assert [row[4] for row in rows] == ["yes", "yes", "no", "no", "no", "yes", "no", "no", "no"]
    confidence = 100 * torch.tensor([3.0, 0, 0, 0]).softmax(0)[0].item()
    assert {row[3] for row in rows} == {round(confidence, 2)}
    assert rows[3][0].image.getpixel((0, 0)) == (2, 0, 0)
    assert {row[0].image.size for row in rows} == {(6 * 12, 8 * 12)}


def test_of_many_classes_the_matrix_has_those_with_the_most_mistakes():
    labels = [n for n in range(40) for _ in range(2)]
    guesses = [n if n < 10 or n % 2 else n - 1 for n in labels]  # 10 to 39: pairs mixed up
    seen = media.final_media(Guess(40), dataset_of(labels, guesses, 40), 16, PLAIN)
    rows = seen["media/confusion_matrix"].rows
    assert len(rows) == media.MATRIX_CLASSES**2
    assert {"c12", "c38"} <= {row[0] for row in rows} == {row[1] for row in rows}
    assert "c3" not in {row[0] for row in rows}
    assert len(seen["media/classes"].rows) == 40


@pytest.mark.parametrize(("number", "shown"), [(1, 1), (32, 32), (33, 32), (100, 32)])
def test_the_images_shown_are_always_the_same_ones(number, shown):
    labels = [n % 5 for n in range(number)]
    first, second = (
        media.final_media(Guess(5), dataset_of(labels, guesses, 5), 7, PLAIN)["media/predictions"]
        for guesses in ([0] * number, labels)
    )
    assert len(first.rows) == shown
    assert [row[1] for row in first.rows] == [row[1] for row in second.rows]


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (30, {1, 15, 30})]
)
def test_attention_is_drawn_after_three_epochs(epochs, expected):
    assert media.media_epochs(epochs) == expected


@pytest.fixture
def network(settings):
    """A function that returns an untrained network with overrides, and its data set."""

    def make(*words):
        cfg = settings(*words)
        dataset = instantiate(cfg.data, _convert_="all")
        torch.manual_seed(3)
        size = {"num_classes": dataset.num_classes, "image_size": dataset.image_size}
        return build_model(cfg, **size), dataset

    return make


def inputs_of_blocks(model, dataset, number):
    """Return each augmented block's input by name, for this many evenly spaced images."""
    inputs = {}
    for name, layer in augmented_layers(model.eval()).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    chosen = [n * len(dataset.evaluation) // number for n in range(number)]
    images = Images(dataset.evaluation.pixels[chosen], dataset.evaluation.labels[chosen])
    ((batch, _),) = evaluation_batches(images, number, dataset.mean, dataset.std)
    model(batch)
    return inputs


def test_pictures_show_the_weights_of_every_augmented_block(network):
    model, dataset = network("attention.Nh=8", "attention.dv=8", "attention.dk=8")
    drawn = media.attention_pictures(model, dataset)
    names = ["stages.1.0.conv1", "stages.2.0.conv1"]
    assert list(drawn) == [f"media/attention/{name}" for name in names]
    tile, step = attention_picture.TILE, attention_picture.TILE + attention_picture.GAP

    # Compute the weights again from each block's input.
    inputs = inputs_of_blocks(model, dataset, 3)
    for name, layer in augmented_layers(model).items():
        (picture,) = drawn[f"media/attention/{name}"]
        header = attention_picture.HEADER
        margin = picture.image.width - (9 * step - attention_picture.GAP)
        assert margin > 60  # room for the row labels
        assert picture.image.height == header + 6 * step - attention_picture.GAP
        for box in ((0, header, margin, picture.image.height), (margin, 0, margin + tile, header)):
            assert picture.image.crop(box).getcolors() != [(1, attention_picture.PAPER)]
        assert "Nh=8" in picture.caption
        side = layer.shape[0]
        for number, maps in enumerate(attention_maps(layer, inputs[name])):
            mean = maps.mean(1)  # over the queries
            entropy = -torch.special.xlogy(maps, maps).sum(-1).mean(0)
            best = maps[:, entropy.argmin()]
            for head in range(8):
                for row, weights in ((2 * number, best[head]), (2 * number + 1, mean[head])):
                    y, x = divmod(int(weights.argmax()), side)
                    middle = ((x + 0.5) * tile / side, (y + 0.5) * tile / side)
                    at = (int((head + 1) * step + middle[0]), int(row * step + middle[1]))
                    # The color is strongest where the weight is largest.
                    red, _, blue = picture.image.getpixel((margin + at[0], header + at[1]))
                    assert red - blue > 140


def test_the_entropy_of_attention_by_loops(network):
    model, dataset = network("attention.qk_norm=true")
    found = media.attention_entropy(model, dataset)
    inputs = inputs_of_blocks(model, dataset, 16)
    shares = []
    for name, layer in augmented_layers(model).items():
        maps = attention_maps(layer, inputs[name]).double()
        (images, heads, queries, positions) = maps.shape
        assert images == 16
        total = sum(-w * math.log(w) for w in maps.flatten().tolist() if w)
        shares.append(total / (images * heads * queries) / math.log(positions))
    assert len(shares) == 2
    assert abs(shares[0] - shares[1]) > 1e-3
    expected = {"attention/entropy": sum(shares) / 2, "attention/lowest_entropy": min(shares)}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_plain_network_has_no_attention(network):
    plain = network("attention=none")
    assert media.attention_entropy(*plain) == media.attention_pictures(*plain) == {}


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_marked_query_is_the_sharpest_one(monkeypatch, at_once):
    weights = torch.full((2, 4, 4), 0.25)
    weights[:, 2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    weights[0, 3] = torch.tensor([0.0, 0.0, 1.0, 0.0])  # sharp in only one head
    maps = weights.unflatten(-1, (2, 2))
    monkeypatch.setattr("aaconv.maps.QUERIES", at_once)
    for module in ("aaconv.maps", "models.views"):
        monkeypatch.setattr(
            f"{module}.attention_maps", lambda layer, x, queries: weights[None, :, queries]
        )
    pixels = torch.zeros(1, 6, 6, 3, dtype=torch.uint8)
    layer = AugmentedConv(3, 4, 3, 2, 2, 2)
    view = views._view(layer, torch.zeros(1, 3, 2, 2), None, torch.zeros(1, 3, 6, 6))
    assert view.queries == [(1, 0)]
    assert torch.equal(view.weights, maps[:, 2:3])
    torch.testing.assert_close(view.mean, maps.mean(dim=1))
    drawn = attention_picture.draw_layer(pixels, ["name"], [view])
    assert drawn.rows == ["name\nfrom 1,0", "mean over\npositions"]
    assert drawn.columns == ["image", "head 1", "head 2"]
    assert drawn.words == "2x2, dk=2, dv=2, Nh=2"
    tile = attention_picture.enlarged(pixels[0]).width
    assert drawn.image.getpixel((1, tile // 2 + 1)) == attention_picture.MARK
    assert drawn.image.getpixel((0, tile // 2 + 1)) == attention_picture.EDGE
    assert drawn.image.getpixel((tile - 2, tile - 2)) == (0, 0, 0)
    below = tile + attention_picture.GAP
    assert drawn.image.getpixel((1, below + tile // 2 + 1)) == (0, 0, 0)  # no query, no mark


def test_the_network_and_the_random_generators_are_left_as_they_were(network):
    model, dataset = network()
    model.train()
    model.stages[1].eval()  # modules may be in different modes
    modes = [module.training for module in model.modules()]
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    media.attention_pictures(model, dataset)
    media.attention_entropy(model, dataset)
    media.final_media(model, dataset, 16, PLAIN)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", [slow("fp32"), thorough("bf16")])
def test_a_run_is_the_same_with_and_without_media(settings, tmp_path, precision):
    words = [f"precision={precision}", "ema=0.9", "epochs=3"]
    scores = []
    for media_too in ("true", "false"):
        more = ["wandb.mode=offline", f"tracking.media={media_too}"]
        cfg = settings(*words, *more, base=[w for w in TINY if "tracking" not in w])
        summary = train.train(cfg, tmp_path / media_too)
        keys = [k for k in summary if "/" in k and not k.startswith("perf/")]
        scores.append({k: summary[k] for k in keys})
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_what_the_dashboard_gets_to_see(settings, tmp_path):
    more = ["wandb.mode=offline", "tracking.weights=true", "epochs=4"]
    cfg = settings(*more, base=[w for w in TINY if "tracking" not in w])
    train.train(cfg, tmp_path / "run")
    records = offline_records(tmp_path)
    history = [r["history"] for r in records if r["type"] == "history"]
    text = [json.dumps(entry) for entry in history]
    assert len(history) == 4
    for block in ("stages.1.0.conv1", "stages.2.0.conv1"):
        assert [f"media/attention/{block}" in entry for entry in text] == [True, True, False, True]
        assert len(list(tmp_path.rglob(f"wandb/**/{block}*.png"))) == 3
    tables = {path.name.split("_")[0]: path for path in tmp_path.rglob("wandb/**/*.table.json")}
    assert tables.keys() == {"predictions", "classes", "confusion"}
    charts = [r["config"]["update"]["_wandb"] for r in records if r["type"] == "config"]
    (visualize,) = [it["visualize"] for it in charts if "visualize" in it]
    summary = [r["summary"]["update"] for r in records if r["type"] == "summary"]
    for name, preset in CHARTS.items():
        panel = visualize[name]["panel_config"]
        assert (panel["panelDefId"], panel["fieldSettings"]) == (preset.name, preset.fields)
        assert chart_table(name) in json.dumps(panel["userQuery"])
        assert any(chart_table(name) in update for update in summary)
    assert len(json.loads(tables["predictions"].read_text())["data"]) == 32
    artifacts = {r["artifact"]["name"]: r["artifact"] for r in records if r["type"] == "artifact"}
    (name,) = [name for name in artifacts if name.startswith("resnet8-aa-")]
    assert artifacts[name]["type"] == "model"
    contents = artifacts[name]["manifest"]["contents"]
    assert {content["path"] for content in contents} == {"weights.safetensors", "config.json"}
    for content in contents:
        kept = tmp_path / "run" / content["path"]
        assert Path(content["local_path"]).read_bytes() == kept.read_bytes()
    assert json.loads(artifacts[name]["metadata"])["config"]["seed"] == 0
