"""Disk cache of decoded images, mapped into memory, so that they need not fit into it.

A cache file holds the pixels of images of one size, what else was found out when decoding them
(JSON), the length of that text, and a CRC-32 of all this. The caller derives its name, a key, from
the bytes of the image files, so that it never stands for other images. A damaged file counts as
absent and is written again. Cache files may be removed at any time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

_TAIL = struct.Struct("<QI")
_PART = 2**22


def cache_folder() -> Path:
    """Return the folder of the cache files. Raises RuntimeError without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aaconv"


def load(key: str, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]] | None:
    """Return images (N, H, W, 3) uint8 of ``size`` (H, W) and facts that are stored under ``key``.

    Returns None if there are none or they are damaged. Writing to the tensor does not change the
    file; pages that are not in use take no memory.
    """
    # RuntimeError: there is no home folder. The others: the file is damaged or another program's.
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError, struct.error):
        path = _path(key)
        if path.is_file():  # opening a named pipe would block forever
            checked, crc = path.stat().st_size - 4, 0
            with path.open("rb") as file:  # a read error in a memory map kills the process
                for start in range(0, checked, _PART):
                    crc = zlib.crc32(file.read(min(_PART, checked - start)), crc)
            content = np.memmap(path, np.uint8, "c")
            length, expected = _TAIL.unpack(content[-_TAIL.size :].tobytes())
            if crc == expected:
                facts = json.loads(content[: -_TAIL.size][-length:].tobytes())
                shape = (facts["images"], *size, 3)
                return torch.from_numpy(content[: math.prod(shape)].reshape(shape)), facts
    return None


def store(
    key: str, blocks: Iterator[np.ndarray[Any, Any]], facts: Callable[[], dict[str, Any]], size: int
) -> bool:
    """Store images under ``key``, all or none of them; return whether that was possible.

    Args:
        key: what `load` finds them by.
        blocks: the images, in blocks (n, H, W, 3) uint8; consumed one at a time.
        facts: called after the last block; returns JSON values, ``images`` being their number.
        size: bytes of all images; nothing is written if the disk has no room for them.
    """
    try:
        path = _path(key)
        # Compiled kernels are kept there as well, and no other user may change those.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"{path.parent} has no room for {size / 1e9:.1f} GB")
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix="part-", ignore_cleanup_errors=True
        ) as staging:
            part, crc = Path(staging, path.name), 0
            part.touch(0o600)
            with part.open("wb") as file:
                for block in blocks:
                    crc = _write(file, block.tobytes(), crc)
                text = json.dumps(facts()).encode()
                crc = _write(file, text + struct.pack("<Q", len(text)), crc)
                file.write(struct.pack("<I", crc))
            os.replace(part, path)
        return True
    except (OSError, RuntimeError) as error:
        log.info("could not cache the decoded images: %s", error)
        return False


def _write(file: Any, content: bytes, crc: int) -> int:
    file.write(content)
    return zlib.crc32(content, crc)


def _path(key: str) -> Path:
    return cache_folder() / f"images-{key}"
