"""Small pictures of attention over an image, which dashboard, report and visualize.py share."""

from PIL import Image, ImageDraw
from torch import Tensor

# The longer side of a tile in pixels, about, and the colours of attention and of the query.
TILE = 128
WARM, MARK = (255, 176, 32), (230, 30, 30)


def enlarged(pixels: Tensor) -> Image.Image:
    """An image (H, W, 3) as a picture of whole, larger pixels."""
    height, width = pixels.shape[:2]
    factor = max(1, round(TILE / max(height, width)))
    image = Image.fromarray(pixels.cpu().numpy())
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def tile(image: Image.Image, weights: Tensor) -> Image.Image:
    """The image in grey, and warm where the weights (h, w) are large: brightest at the largest."""
    shades = (255 * weights / weights.max().clamp(min=1e-30)).round().byte()
    heat = Image.fromarray(shades.numpy()).resize(image.size, Image.Resampling.NEAREST)
    grey = image.convert("L").point([v // 3 for v in range(256)]).convert("RGB")
    return Image.composite(Image.new("RGB", image.size, WARM), grey, heat)


def marked(image: Image.Image, query: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """The image with a frame around the position (row, column) of a map of ``size`` (h, w)."""
    row, column = query
    left, right = (c * image.width // size[1] for c in (column, column + 1))
    top, bottom = (r * image.height // size[0] for r in (row, row + 1))
    framed = image.copy()
    # A map may be finer than the picture.
    corner = (max(left, right - 1), max(top, bottom - 1))
    ImageDraw.Draw(framed).rectangle((left, top, *corner), outline=MARK, width=3)
    return framed
