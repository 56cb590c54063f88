"""Attention over images as one picture, which dashboard, report and visualize.py share."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from models.views import AttentionView

# The longer side of a tile in pixels, about, and the colors of attention and of the query.
TILE = 128
WARM, MARK = (255, 176, 32), (230, 30, 30)
# The space between tiles in pixels, and the color behind them.
GAP, PAPER = 6, (255, 255, 255)


@dataclass(frozen=True)
class AttentionPicture:
    """The attention of one layer on several images, a tile for each head.

    Attributes:
        image: the tiles.
        rows: what each row shows: the number of its image, from 0 on, and the query's
            (row, column), or None for the mean over all queries.
        heads: the number of tiles beside the image.
    """

    image: Image.Image
    rows: list[tuple[int, tuple[int, int] | None]]
    heads: int


def attention_picture(images: Tensor, views: Sequence[AttentionView]) -> AttentionPicture:
    """Draw the ``views`` of one layer, each on its image of (B, H, W, 3), values 0 to 255.

    A row for each query has the image with the query's position marked, and beside it what each
    head sees from there. Below them is a row of the mean over all queries, where a view has it. The
    brightest position of a tile has its largest weight.
    """
    rows: list[list[Image.Image]] = []
    labels: list[tuple[int, tuple[int, int] | None]] = []
    for number, (pixels, view) in enumerate(zip(images, views, strict=True)):
        image = enlarged(pixels)
        for index, query in enumerate(view.queries):
            heads = [tile(image, weights[index]) for weights in view.weights]
            rows.append([marked(image, query, view.size), *heads])
            labels.append((number, query))
        if view.mean is not None:
            rows.append([image, *(tile(image, weights) for weights in view.mean)])
            labels.append((number, None))
    return AttentionPicture(_grid(rows), labels, views[0].weights.shape[0])


def layer_line(view: AttentionView) -> str:
    """Map size, dk, dv and Nh of a view's layer."""
    height, width = view.size
    layer = view.layer
    return f"{height}x{width}, dk={layer.dk}, dv={layer.dv}, Nh={layer.Nh}"


def enlarged(pixels: Tensor) -> Image.Image:
    """An image (H, W, 3) as a picture of whole, larger pixels."""
    height, width = pixels.shape[:2]
    factor = max(1, round(TILE / max(height, width)))
    image = Image.fromarray(pixels.cpu().numpy())
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def tile(image: Image.Image, weights: Tensor) -> Image.Image:
    """The image in gray, and warm where the weights (h, w) are large: brightest at the largest."""
    shades = (255 * weights / weights.max().clamp(min=1e-30)).round().byte()
    heat = Image.fromarray(shades.numpy()).resize(image.size, Image.Resampling.NEAREST)
    gray = image.convert("L").point([v // 3 for v in range(256)]).convert("RGB")
    return Image.composite(Image.new("RGB", image.size, WARM), gray, heat)


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


def _grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    width, height = (side + GAP for side in rows[0][0].size)
    page = Image.new("RGB", (len(rows[0]) * width - GAP, len(rows) * height - GAP), PAPER)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(image, (x * width, y * height))
    return page
