"""Which parameters get weight decay, and which get a multiple of the learning rate."""

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from models import freeze
from training.optimizer import make_optimizer, parameter_groups
from training.settings import build_model, check

from helpers import rows


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.part = Part()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 2))
        self.weight = nn.Parameter(torch.zeros(3, 2))

    def no_weight_decay(self):
        return {"table"}


def test_weights_are_decayed_and_nothing_else(settings):
    model = Net()
    decayed, spared = parameter_groups(model, settings("optim.decay=weights").optim)
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == ["conv.weight", "part.weight"]
    assert [names[p] for p in spared["params"]] == [
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "part.table",
    ]
    assert spared["weight_decay"] == 0
    assert "weight_decay" not in decayed


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", ["all", "weights"])
def test_a_step_without_gradients_shrinks_what_is_decayed(settings, optim, decay):
    cfg = settings(
        f"optim={optim}", f"optim.decay={decay}", "optim.lr=0.5", "optim.weight_decay=0.1"
    )
    model = Net()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(cfg.optim, model).step()
    shrunk = {name for name, p in model.named_parameters() if p.min().item() < 1}
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    assert shrunk == (everything if decay == "all" else {"conv.weight", "part.weight"})


@pytest.mark.parametrize("decay", ["all", "weights"])
def test_a_factor_multiplies_the_steps_of_its_parameters_alone(settings, decay):
    """This holds in each step; without momentum, a step is the learning rate times the gradient."""
    words = ["optim=sgd", "optim.momentum=0", "optim.nesterov=false", "optim.weight_decay=0"]
    words += ["schedule=step", "schedule.milestones=[0.5]", f"optim.decay={decay}", "optim.lr=0.5"]
    kinds = {"norm_bias": 64, "attention": 0.25, "head": 3}
    factors = [f"optim.lr_factors.{kind}={factor}" for kind, factor in kinds.items()]
    moved = []
    for cfg in (settings(*words), settings(*words, *factors)):
        model = build_model(cfg, num_classes=3, image_size=(8, 8))
        freeze(model, ["stages.0"])
        optimizer = make_optimizer(cfg.optim, model)
        schedule = instantiate(cfg.schedule)(optimizer, 4)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            schedule.step()
        moved.append({name: p.flatten()[0].item() for name, p in model.named_parameters()})
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.2)
    plain, own = moved
    for name, before in plain.items():
        inner = name.rpartition(".")[0].rpartition(".")[2]
        factor = 1
        if ".bn" in f".{inner}" and name.endswith("bias"):
            factor = 64
        elif inner in ("qkv_conv", "attn_out") or "key_rel" in name:
            factor = 0.25
        elif inner == "head":
            factor = 3
        assert own[name] == pytest.approx(factor * before), name
        assert (before == 0) == name.startswith("stages.0"), name


def test_a_factor_of_what_is_not_there_is_refused(settings):
    words = ["attention=none", "optim.lr_factors.attention=2"]
    with pytest.raises(ValueError, match=r"optim.lr_factors.attention=2.0: .*leave it at 1"):
        check(settings(*words))
    with pytest.raises(ValueError, match=r"optim.lr_factors.head=2.0: .*leave it at 1"):
        check(settings("optim.lr_factors.head=2", "freeze=[head]"))


def test_the_settings_change_a_run(run, tmp_path):
    variants = ("optim.decay=all", "optim.decay=weights", "optim.lr_factors.norm_bias=64")
    for variant in variants:
        run(variant, "optim.weight_decay=0.5", folder=variant)
    plain, *others = (rows(tmp_path / variant) for variant in variants)
    assert all(other != plain for other in others)
