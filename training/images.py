"""Whether a run is of the images that are there now, as `data.Dataset.digest` tells them apart."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import FolderConfig
from data import folder_digest


def current_digest(config: Mapping[str, Any]) -> str | None:
    """The digest of the images that a run with the settings ``config`` would be of.

    Those of a folder are read for it, and not decoded. None where there is nothing to compare: the
    folder is not there, or the settings alone say what the images are, as of all other data sets.

    Raises:
        FileNotFoundError, ValueError, OSError: the folder is there, but is no data set; see
            `data.load_folder`.
    """
    data = dict(config["data"])
    if data.pop("_target_") != FolderConfig._target_:
        return None
    del data["name"]  # which is not of the images
    return folder_digest(**data) if Path(os.path.expanduser(data["root"])).exists() else None


def differ(digest: str | None, config: Mapping[str, Any]) -> bool:
    """Whether ``digest``, None if it is not known, is of other images than `current_digest`.

    Raises:
        FileNotFoundError, ValueError, OSError: see `current_digest`.
    """
    current = current_digest(config) if digest is not None else None
    return current not in (None, digest)


def other_images(path: Path, name: str) -> str:
    """One line on the run in ``path``, which is of other images that have this name, too."""
    return (
        f"{path} is of a run on different images that are also called {name}; another name= or "
        "data.name= keeps them apart, overwrite=true with resume=auto trains it again"
    )
