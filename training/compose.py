"""Settings without a command line: what train.py would make of the same words."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from configs.schema import register

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The settings that ``train.py`` has with these overrides.

    Raises:
        HydraException, OmegaConfBaseException: there are no such settings.
    """
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))
