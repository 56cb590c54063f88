"""Draw attention over images as one picture, for the dashboard, the report and visualize.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from data import Images, evaluation_batches
from models.views import AttentionView, attention_views

# Approximate length of a tile's longer side in pixels, and the color of attention.
TILE = 128
WARM = (235, 70, 0)
# Opacity of that color at the largest weight; below 1, so that the image stays visible.
MAX_ALPHA = 0.8
# Colors of the query's frame (outer and inner lines; line between): visible on any image.
EDGE, MARK = (0, 0, 0), (255, 255, 255)
# Pixels between tiles and above them (for the names of the heads); background and text colors.
GAP, HEADER = 6, 26
PAPER, INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class AttentionPicture:
    """The attention of one layer on several images, as rows and columns of tiles.

    Attributes:
        words: the layer's map size, dk, dv and Nh.
        image: the tiles.
        rows: the label of each row: the name of an image with the query's row and column, or the
            mean over all queries.
        columns: the label of each column: the image, then each head.
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
    """Return a picture for each augmented layer of ``model``, by layer name; empty without any.

    Args:
        model: the network.
        images: the images to attend to, on the model's device.
        names: the name of each image.
        mean, std: the normalization of the network's input.
        queries: pixels (row, column), see `models.views.attention_views`.

    Raises:
        ValueError: if a query lies outside the images.
    """
    (batch, _), *_ = evaluation_batches(images, len(images), mean, std)
    layers = attention_views(model, batch, queries)
    return {layer: draw_layer(images.pixels, names, views) for layer, views in layers.items()}


def draw_layer(
    images: Tensor, names: Sequence[str], views: Sequence[AttentionView]
) -> AttentionPicture:
    """Draw the ``views`` of one layer, each on its image of (B, H, W, 3), values 0 to 255.

    Each query has a row: the image with the query's position marked, then the attention of each
    head from there. Below them, if the view has it, is a row with the mean over all queries. In
    each tile the color is strongest at the largest weight.
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
    """Return an image (H, W, 3) enlarged by an integer factor, without interpolation."""
    height, width = pixels.shape[:2]
    factor = max(1, round(TILE / max(height, width)))
    image = Image.fromarray(pixels.cpu().numpy())
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def tile(image: Image.Image, weights: Tensor) -> Image.Image:
    """Return the image in light gray, with the color of attention over it by weights (h, w).

    The opacity is proportional to the weight and reaches `MAX_ALPHA` at the largest.
    """
    alpha = 255 * MAX_ALPHA * weights / weights.max().clamp(min=1e-30)
    cover = Image.fromarray(alpha.round().byte().numpy())
    gray = image.convert("L").point([64 + v * 5 // 8 for v in range(256)]).convert("RGB")
    cover = cover.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, WARM), gray, cover)


def marked(image: Image.Image, query: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """Return the image with a frame around one position (row, column) of a map of size (h, w)."""
    row, column = query
    left, right = (c * image.width // size[1] for c in (column, column + 1))
    top, bottom = (r * image.height // size[0] for r in (row, row + 1))
    framed = image.copy()
    # A map may have more positions than the picture has pixels.
    box = (left, top, max(left, right - 1), max(top, bottom - 1))
    draw = ImageDraw.Draw(framed)
    for inset, color in enumerate((EDGE, MARK, MARK, EDGE)):
        inner = (box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset)
        if inner[0] <= inner[2] and inner[1] <= inner[3]:
            draw.rectangle(inner, outline=color)
    return framed


def labeled(picture: AttentionPicture) -> Image.Image:
    """Return the tiles with column labels above them and row labels on the left."""
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
    """Return ``text`` with escapes for characters that the font would draw as a box."""
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
