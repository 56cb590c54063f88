"""Build what a run trains with from its settings: network, batches, optimizer, schedule."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import aaconv
from data import Batches, Dataset, evaluation_batches
from models import Description, ForeignWeights, ResNet, Trained, describe, freeze
from models.fields import FORMAT
from models.views import eval_mode
from training import distributed, provenance
from training.compose import make
from training.device import compiled, dtype_name, set_deterministic, to_device
from training.initial import take_weights
from training.loss import class_weights
from training.optimizer import make_optimizer
from training.settings import build_model, resolve
from training.variants import public_settings


class RunState(NamedTuple):
    """The parts of a run in training: data, model, optimizer, and the device they are on."""

    world: distributed.World
    device: torch.device
    dtype: torch.dtype
    dataset: Dataset
    batches: Batches
    description: Description
    model: nn.Module
    wrapped_model: Any  # the model as training calls it: compiled, DistributedDataParallel
    ema_model: AveragedModel | None
    best_model: nn.Module | None  # copy of the evaluated model after the best epoch so far
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    class_weights: Tensor | None  # (classes,), used by the loss

    def stateful(self) -> dict[str, Any]:
        """Return the objects whose state dicts go into a checkpoint, by name."""
        names = ("model", "optimizer", "schedule", "scaler", "ema_model", "best_model")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the EMA model if there is one."""
        if self.ema_model is None:
            return self.model
        averaged: nn.Module = self.ema_model.module
        return averaged


def build_state(
    cfg: DictConfig,
    dataset: Dataset,
    world: distributed.World,
    device: torch.device,
    dtype: torch.dtype,
    initial: Trained | ForeignWeights | None = None,
) -> RunState:
    """Build the state of a new run, with those weights of ``initial`` that fit the network.

    Raises:
        ValueError: if a setting does not fit the data, or nothing in ``initial`` fits.
    """
    torch.manual_seed(cfg.seed)
    set_deterministic(cfg.deterministic)
    network = build_model(cfg, num_classes=dataset.num_classes, image_size=dataset.image_size)
    if initial is not None:
        take_weights(network, initial, dataset, cfg.init_from, cfg.freeze)
    freeze(network, cfg.freeze)
    model = to_device(network, device, cfg.channels_last)
    if cfg.sync_batchnorm:
        model = distributed.convert_sync_batchnorm(model, device)
    batches = Batches(
        dataset.train,
        cfg.batch_size,
        make(cfg.augmentation),
        dataset.mean,
        dataset.std,
        cfg.seed,
        shard=(world.rank, world.size),
        micro_batches=cfg.grad_accum,
        num_classes=dataset.num_classes,
        balanced=cfg.balanced_sampling,
    )
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if cfg.compile:  # backends are tried before compiling: a compiled network cannot do it
        image = evaluation_batches(dataset.evaluation, 1, dataset.mean, dataset.std)
        try_backends(model, image, autocast)
    optimizer = make_optimizer(cfg.optim, model)
    ema_model = None
    if cfg.ema is not None:
        ema_model = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True
        )
    best_model = None
    if cfg.keep_best:
        if dataset.evaluated_on != "val":
            raise ValueError(
                "keep_best=true needs held-out images, data.val_size=N: a test set must not choose "
                "the epoch"
            )
        best_model = copy.deepcopy(model)
    wrapped_model = distributed.wrap_ddp(model, device)
    return RunState(
        world=world,
        device=device,
        dtype=dtype,
        dataset=dataset,
        batches=batches,
        description=describe_run(cfg, network, dataset, dtype),
        model=model,
        wrapped_model=compiled(wrapped_model) if cfg.compile else wrapped_model,
        ema_model=ema_model,
        best_model=best_model,
        optimizer=optimizer,
        schedule=make(cfg.schedule)(optimizer, cfg.epochs * len(batches)),
        autocast=autocast,
        # Only fp16 has too small a range for gradients.
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        class_weights=class_weights(cfg.class_weights, dataset.train, dataset.num_classes),
    )


def describe_run(
    cfg: DictConfig, network: ResNet, dataset: Dataset, dtype: torch.dtype
) -> Description:
    """Return the description saved with the weights, enough to rebuild the network from it."""
    return Description(
        format=FORMAT,
        network=describe(network),
        class_names=list(dataset.class_names),
        mean=list(dataset.mean),
        std=list(dataset.std),
        data=dataset.name,
        data_digest=dataset.digest,
        settings=public_settings(resolve(cfg)),
        precision=dtype_name(dtype),
        version=aaconv.__version__,
        commit=provenance.commit(),
    )


def try_backends(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], autocast: torch.autocast
) -> None:
    """Run the first of ``batches`` through ``model``, so attention tries or compiles a backend."""
    images, _ = next(batches)
    with eval_mode(model), torch.no_grad(), autocast:
        model(images)
