"""Settings without a command line, and what an option of a group makes of its settings."""

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

import configs.schema  # noqa: F401 (which registers the settings with Hydra)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The settings that ``train.py`` has with these overrides.

    Raises:
        HydraException, OmegaConfBaseException: there are no such settings.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """What these words ask for, as on the command line of ``train.py -m``.

    Raises:
        HydraException: they are no overrides.
    """
    begun = GlobalHydra.instance().is_initialized()
    with nullcontext() if begun else initialize_config_dir(str(CONFIGS), version_base="1.3"):
        # Without a loader ``glob`` would not know the options of a group.
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        return parser.parse_overrides(list(words))


def make(settings: DictConfig | Mapping[Any, Any]) -> Any:
    """What the ``_target_`` of these settings makes of them: a data set, an augmentation, ...

    Raises:
        Exception: whatever the target raises, which Hydra would wrap into an error of its own.
    """
    try:
        return instantiate(settings, _convert_="all")
    except InstantiationException as error:
        raised = error.__cause__ or error
    raise raised
