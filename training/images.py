"""Check whether a run's images are still the current ones, by `data.Dataset.digest`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import FolderConfig
from data import folder_digest


def current_digest(config: Mapping[str, Any]) -> str | None:
    """Return the digest of the images that a run with the settings ``config`` would use now.

    Images of a folder are read for it, but not decoded. None if there is nothing to compare: the
    folder is missing, or the data set is not a folder and its settings alone determine its images.

    Raises:
        FileNotFoundError, ValueError, OSError: if the folder exists but is not a data set; see
            `data.load_folder`.
    """
    data = dict(config["data"])
    if data.pop("_target_") != FolderConfig._target_:
        return None
    del data["name"]  # does not affect the images
    return folder_digest(**data) if Path(os.path.expanduser(data["root"])).exists() else None


def differ(digest: str | None, config: Mapping[str, Any]) -> bool:
    """Whether ``digest`` and `current_digest` are known and of different images.

    Raises:
        FileNotFoundError, ValueError, OSError: see `current_digest`.
    """
    current = current_digest(config) if digest is not None else None
    return current not in (None, digest)


def other_images(path: Path, name: str) -> str:
    """Return the error message for the run in ``path`` on different images of the same name."""
    return (
        f"{path} is from a run on other images that are also called {name}; another name= or "
        "data.name= keeps them apart, overwrite=true with resume=auto trains it again"
    )
