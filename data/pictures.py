"""Read image files of any format and size that Pillow supports, as input for a network."""

from __future__ import annotations

import re
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from aaconv.text import one_line

# Enough for a photograph of 108 million pixels; a file that claims more may be an attack.
MAX_PIXELS = 2**28
WHITE_OF_16_BITS = 65535
# Range of white: float32 must be able to hold 255 / white.
WHITES = (1e-30, 1e30)
# Formats that run another program, that Pillow recognizes but cannot decode, or that are metadata.
_NO_FORMATS = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC"}
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still this many times the target.
_GAP = 3
# Images of more pixels than this are decoded one at a time, to save memory.
_LARGE = 2**25
_one_large = threading.Lock()
# Images with 16 bits per color, of which Pillow reads only the upper 8. A PPM states its value of
# white; if that is not 65535 but, say, 4095, Pillow scales the colors by it.
_DEEP_COLOR = re.compile(r";16[BLN]|'RGB', 65535")


class Decoded(NamedTuple):
    """An image as ``pixels`` (H, W, 3) uint8.

    ``largest_gray`` is the largest value of a gray image with more than 8 bits, ``largest_color``
    that of a color image with more, of which only the upper 8 bits are read; -1 otherwise.
    """

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    largest_gray: float = -1
    largest_color: float = -1


def read_picture(
    path: Path,
    size: tuple[int, int],
    white: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read a file as an RGB image (H, W, 3) uint8 that is fitted to ``size`` (H, W); see `decode`.

    Raises:
        ValueError: in one line, if it is not an image, is damaged, has more than ``max_pixels``, or
            is not a regular file.
        OSError: if it cannot be read.
    """
    content = read_file(path)
    with reading(max_pixels):
        return torch.from_numpy(decode(content, size, white).pixels)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file; raise ValueError for a pipe or device, without waiting for it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return path.read_bytes()


def reading_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``white`` and ``max_pixels`` for `read_picture` from a trained network's settings.

    Raises ValueError if they are invalid.
    """
    data = settings.get("data")
    data = data if isinstance(data, dict) else {}
    white, most = data.get("white"), data.get("max_pixels", MAX_PIXELS)
    check_white(white)
    if type(most) is not int or most < 1:
        raise ValueError(f"data.max_pixels={most} must be a whole number, at least 1")
    return {"white": white, "max_pixels": most}


def check_white(white: Any) -> None:
    """Raise ValueError unless ``white`` is None or a number in the range `WHITES`."""
    fits = type(white) in (int, float) and WHITES[0] <= white <= WHITES[1]
    if white is not None and not fits:
        raise ValueError(f"data.white={white} must be a number from {WHITES[0]} to {WHITES[1]}")


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NO_FORMATS)


@cache
def endings() -> frozenset[str]:
    """The file extensions of images, in lower case and with their dot."""
    known = formats()
    registered = Image.registered_extensions().items()
    return frozenset(ending.lower() for ending, name in registered if name in known)


@contextmanager
def reading(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Set Pillow's limit and warnings as `decode` needs them, for the whole process."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Pillow's warnings about odd metadata do not matter here.
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def decode(content: bytes, size: tuple[int, int], white: float | None = None) -> Decoded:
    """Decode an image file for ``size`` (H, W); several threads may do so within one `reading`.

    The image is rotated as its EXIF data say, put on white where it is transparent, scaled
    (bicubic, aspect ratio kept) until it covers ``size``, and cropped at the center. An image that
    already has this size is not changed. Only the first of several frames is used. Gray values of
    more than 8 bits are scaled so that ``white``, by default 65,535 for integers, becomes 255.

    Raises:
        ValueError: in one line, if it is not an image, is damaged, or has more pixels than
            `reading` allows; if values are negative, not finite or above ``white``; or if they are
            floating-point numbers and ``white`` is None.
    """
    try:
        with Image.open(BytesIO(content), formats=formats()) as picture:
            side = _GAP * max(size)
            picture.draft(None, (side, side))
            large = picture.width * picture.height > _LARGE
            with _one_large if large else nullcontext():
                return _decode(picture, size, white)
    except UnidentifiedImageError:
        raise ValueError("it is not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"it has more than {limit} pixels (data.max_pixels)") from None
    except (MemoryError, _NumbersError):
        raise
    except Exception as error:  # Pillow raises all kinds of errors for damaged files
        raise ValueError(f"it is damaged: {one_line(error)}") from error


class _NumbersError(ValueError):
    """The image is intact, but its values cannot be used."""


def _decode(picture: Any, size: tuple[int, int], white: float | None) -> Decoded:
    deep_color = any(_DEEP_COLOR.search(str(tile[3])) for tile in picture.tile)
    picture.load()  # rotates a TIFF and removes its orientation
    picture.getexif()  # is cached; the raw data may be damaged and must not be written again
    for name in ("exif", "Raw profile type exif"):
        picture.info.pop(name, None)
    ImageOps.exif_transpose(picture, in_place=True)
    largest_gray = largest_color = -1.0
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture, largest_gray = _scaled(picture, white)
    elif deep_color:
        if white not in (None, WHITE_OF_16_BITS):
            raise _NumbersError(
                "it has 16 bits for each color, of which only the upper 8 are read: data.white "
                "holds for gray images alone; save it with 8 bits for each color"
            )
        # The largest value that an upper byte may stand for; alpha is not a color.
        colors = [picture.getchannel(name) for name in picture.getbands() if name not in "AX"]
        largest_color = max(band.getextrema()[1] for band in colors) * 256 + 255
    fitted = ImageOps.fit(_as_rgb(picture), size[::-1], method=Image.Resampling.BICUBIC)
    return Decoded(np.array(fitted), largest_gray, largest_color)


def _scaled(picture: Any, white: float | None) -> tuple[Any, float]:
    """Return a gray image of more than 8 bits scaled to 8 bits, and its largest value."""
    numbers = np.asarray(picture)
    lowest, largest = float(numbers.min()), float(numbers.max())
    if not np.isfinite([lowest, largest]).all():
        raise _NumbersError("it has numbers that are not finite")
    if lowest < 0:
        raise _NumbersError(f"it has numbers from {lowest:g} to {largest:g}; 0 must be black")
    if white is None and picture.mode == "F":
        raise _NumbersError(
            f"it has floating-point numbers from {lowest:g} to {largest:g}; data.white=N says "
            "which one is white"
        )
    white = WHITE_OF_16_BITS if white is None else white
    if largest > white:
        raise _NumbersError(
            f"its largest value, {largest:g}, is above white, {white:g} (data.white)"
        )
    levels = numbers * np.float32(255 / white) + np.float32(0.5)
    if "transparency" in picture.info:  # the transparent value of a PNG
        levels[numbers == picture.info["transparency"]] = 255
    return Image.fromarray(levels.astype(np.uint8)), largest


def _as_rgb(picture: Any) -> Any:
    if "A" in picture.getbands() or "transparency" in picture.info:
        opaque = picture.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
