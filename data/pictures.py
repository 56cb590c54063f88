"""Pictures of any format and size that Pillow reads, as a network takes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aaconv.text import one_line


def read_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture as (H, W, 3) uint8, RGB, for ``size`` (H, W).

    It is turned as its EXIF data say, laid on white where it is transparent, and scaled with its
    sides in proportion (bicubic) until it covers ``size``; what then sticks out at two sides is cut
    off, half at each. A picture of just this size stays as it is. Of several frames the first is
    taken. Gray pictures of 16 bits keep their upper eight.

    Raises:
        ValueError: it is no picture, is damaged, or is so large that it may be an attack; one line.
        OSError: it cannot be read.
    """
    with reading():
        return read_by_several(path, size)


@contextmanager
def reading() -> Iterator[None]:
    """Pillow's warnings as `read_picture` wants them; they are the whole process's."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # What Pillow has to say of odd metadata, such as damaged EXIF, does not matter here.
        warnings.simplefilter("ignore", UserWarning)
        yield


def read_by_several(path: Path, size: tuple[int, int]) -> Tensor:
    """`read_picture` for several threads at once, all of them within one `reading`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    height, width = size
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            fitted = ImageOps.fit(
                _as_rgb(upright), (width, height), method=Image.Resampling.BICUBIC
            )
    except UnidentifiedImageError:
        raise ValueError("it is not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("it has more pixels than Pillow takes to be safe") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"it is damaged: {one_line(error)}") from error
    except (ValueError, SyntaxError, EOFError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"it is damaged: {one_line(error)}") from error
    return torch.from_numpy(np.array(fitted))


def _as_rgb(picture: Any) -> Any:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        gray = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        opaque = picture.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return picture.convert("RGB")
