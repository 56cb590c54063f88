"""Attention over images as one picture, which dashboard, report and visualize.py share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from data import Images, evaluation_batches
from models.views import AttentionView, attention_views

# The longer side of a tile in pixels, about, and the color of attention.
TILE = 128
WARM = (235, 70, 0)
# How much of a tile is that color where the weight is largest: the image stays visible below it.
MAX_ALPHA = 0.8
# The frame of the query, outer and inner lines and the one between them: no image is like that.
EDGE, MARK = (0, 0, 0), (255, 255, 255)
# The space between tiles in pixels, that above them for the heads' names, and the colors.
GAP, HEADER = 6, 26
PAPER, INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class AttentionPicture:
    """The attention of one layer on several images: rows and columns of tiles.

    Attributes:
        words: the layer's map size, dk, dv and Nh.
        image: the tiles.
        rows: what each row shows: the name of an image and the query's row and column, or the mean
            over all queries.
        columns: the image, and each head.
    """

    words: str
    image: Image.Image
    rows: list[str]
    columns: list[str]


def attention_pictures(
    model: nn.Module,
    images: Images,
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    queries: Sequence[tuple[int, int]] | None = None,
) -> dict[str, AttentionPicture]:
    """A picture for each augmented layer of ``model``, by its name; none for a plain network.

    Args:
        model: the network.
        images: what it looks at, on its device.
        names: what each image is called.
        mean, std: by which the network gets them normalized.
        queries: pixels (row, column), see `models.views.attention_views`.

    Raises:
        ValueError: a pixel that is not in the images.
    """
    (batch, _), *_ = evaluation_batches(images, len(images), mean, std)
    layers = attention_views(model, batch, queries)
    return {layer: draw_layer(images.pixels, names, views) for layer, views in layers.items()}


def draw_layer(
    images: Tensor, names: Sequence[str], views: Sequence[AttentionView]
) -> AttentionPicture:
    """Draw the ``views`` of one layer, each on its image of (B, H, W, 3), values 0 to 255.

    A row for each query has the image with the query's position marked, and beside it what each
    head sees from there. Below them is a row of the mean over all queries, where a view has it. The
    position of a tile with the most color has its largest weight.
    """
    tiles: list[list[Image.Image]] = []
    rows: list[str] = []
    for pixels, name, view in zip(images, names, views, strict=True):
        image = enlarged(pixels)
        for index, query in enumerate(view.queries):
            heads = [tile(image, weights[index]) for weights in view.weights]
            tiles.append([marked(image, query, view.size), *heads])
            rows.append(f"{name}\nfrom {query[0]},{query[1]}")
        if view.mean is not None:
            tiles.append([image, *(tile(image, weights) for weights in view.mean)])
            rows.append("mean over\npositions")
    height, width = views[0].size
    layer = views[0].layer
    words = f"{height}x{width}, dk={layer.dk}, dv={layer.dv}, Nh={layer.Nh}"
    columns = ["image", *(f"head {number}" for number in range(1, layer.Nh + 1))]
    return AttentionPicture(words, _grid(tiles), rows, columns)


def enlarged(pixels: Tensor) -> Image.Image:
    """An image (H, W, 3) as a picture of whole, larger pixels."""
    height, width = pixels.shape[:2]
    factor = max(1, round(TILE / max(height, width)))
    image = Image.fromarray(pixels.cpu().numpy())
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def tile(image: Image.Image, weights: Tensor) -> Image.Image:
    """The image in light gray, and below the color of attention where the weights (h, w) are large.

    The color is proportional to the weight; at the largest it covers `MAX_ALPHA` of the image.
    """
    alpha = 255 * MAX_ALPHA * weights / weights.max().clamp(min=1e-30)
    cover = Image.fromarray(alpha.round().byte().numpy())
    gray = image.convert("L").point([64 + v * 5 // 8 for v in range(256)]).convert("RGB")
    cover = cover.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, WARM), gray, cover)


def marked(image: Image.Image, query: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """The image with a frame around the position (row, column) of a map of ``size`` (h, w)."""
    row, column = query
    left, right = (c * image.width // size[1] for c in (column, column + 1))
    top, bottom = (r * image.height // size[0] for r in (row, row + 1))
    framed = image.copy()
    # A map may be finer than the picture.
    box = (left, top, max(left, right - 1), max(top, bottom - 1))
    draw = ImageDraw.Draw(framed)
    for inset, color in enumerate((EDGE, MARK, MARK, EDGE)):
        inner = (box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset)
        if inner[0] <= inner[2] and inner[1] <= inner[3]:
            draw.rectangle(inner, outline=color)
    return framed


def labeled(picture: AttentionPicture) -> Image.Image:
    """The tiles with their columns named above and their rows at the left."""
    font = ImageFont.load_default(size=14)
    rows = [_with_letters_of(font, row) for row in picture.rows]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(round(ruler.multiline_textbbox((0, 0), row, font)[2]) for row in rows) + 2 * GAP
    page = Image.new("RGB", (margin + picture.image.width, HEADER + picture.image.height), PAPER)
    page.paste(picture.image, (margin, HEADER))
    draw = ImageDraw.Draw(page)
    width = (picture.image.width + GAP) / len(picture.columns)
    height = (picture.image.height + GAP) / len(rows)
    for number, text in enumerate(picture.columns):
        middle = margin + (number + 0.5) * width - GAP / 2
        draw.text((middle, HEADER / 2), text, INK, font, anchor="mm")
    for number, text in enumerate(rows):
        middle = HEADER + (number + 0.5) * height - GAP / 2
        draw.multiline_text((GAP, middle), text, INK, font, anchor="lm")
    return page


def _with_letters_of(font: Any, text: str) -> str:
    """``text`` with escapes for what the font would draw as a box."""
    box = bytes(font.getmask("\U0010ffff"))
    letters = (c if c == "\n" or bytes(font.getmask(c)) != box else ascii(c)[1:-1] for c in text)
    return "".join(letters)


def _grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    width, height = (side + GAP for side in rows[0][0].size)
    page = Image.new("RGB", (len(rows[0]) * width - GAP, len(rows) * height - GAP), PAPER)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(image, (x * width, y * height))
    return page
