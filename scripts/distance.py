"""Draw accuracy on the built-in task over how far apart cue and shapes are.

    python scripts/compare.py --vary attention=none,aa data.distance=4,8,12,16,20,24 \\
        --seeds 0 1 2 --out outputs/distance -- experiment=lookup
    python scripts/distance.py outputs/distance --out distance.svg

The finished runs with a data.distance below the given folders become a line for each network and
attention, over the distance as a multiple of the receptive field of the network's convolutions.
Seeds are drawn as dots. The same numbers are printed as a table.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="FOLDER", help="run folders, or folders above them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg", help="the picture")


if __name__ == "__main__":
    start(__file__, options)


from benchmarks.lookup_bound import ceiling
from data.lookup import SHAPES_SHOWN
from reporting import distance, figures
from reporting.runs import read
from reporting.text import printable
from training.files import write_text


def draw(folders: list[Path], out: Path) -> str:
    """Write the picture of the runs below ``folders`` to ``out`` and return its numbers as text.

    Raises:
        ValueError: if there is nothing to draw, or not in one picture; nothing is written then.
        OSError: if a file cannot be read or written.
    """
    if out.suffix != ".svg":
        raise ValueError(
            f"--out {out}: the picture is an SVG file; give it a name that ends in .svg"
        )
    runs, excluded = read(folders)
    curves, left = distance.curves(runs)
    figure = distance.draw(curves, 100 / SHAPES_SHOWN, 100 * float(ceiling()))
    write_text(out, figures.as_svg(figure))
    lines = distance.table(curves)
    lines += [f"left out, {e.kind}: {e.folder} ({e.why})" for e in [*excluded, *left]]
    return "\n".join([*lines, f"written: {out}"])


@command(options)
def main(args: argparse.Namespace) -> None:
    print(printable(draw(args.runs, args.out)))
