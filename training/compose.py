"""Compose settings without a command line, and instantiate what a config group describes."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

import configs.schema  # noqa: F401 (registers the settings with Hydra)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Return the settings that ``train.py`` would have with these overrides.

    Raises:
        HydraException, OmegaConfBaseException: if there is no such setting.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Parse these words as overrides on the command line of ``train.py -m``.

    Raises:
        HydraException: if a word is not an override.
    """
    begun = GlobalHydra.instance().is_initialized()
    with nullcontext() if begun else initialize_config_dir(str(CONFIGS), version_base="1.3"):
        # Without a config loader, ``glob`` could not list the options of a group.
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        return parser.parse_overrides(list(words))


def make(settings: DictConfig | Mapping[Any, Any]) -> Any:
    """Instantiate the ``_target_`` of these settings: a data set, an augmentation, ...

    Raises:
        Exception: whatever the target raises, without Hydra's InstantiationException around it.
    """
    try:
        return instantiate(settings, _convert_="all")
    except InstantiationException as error:
        raised = error.__cause__ or error
    raise raised
