"""Which parameters an optimizer decays."""

import pytest
import torch
from torch import nn

from training.optimizer import make_optimizer, parameter_groups

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


def test_weights_are_decayed_and_nothing_else():
    model = Net()
    decayed, spared = parameter_groups(model)
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


def test_the_setting_changes_a_run(run, tmp_path):
    for decay in ("all", "weights"):
        run(f"optim.decay={decay}", "optim.weight_decay=0.5", folder=decay)
    assert rows(tmp_path / "all") != rows(tmp_path / "weights")
