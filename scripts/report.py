"""Turn run folders into a page that answers whether attention helps, and the same as Markdown.

    python scripts/report.py outputs/compare/NAME [--data cifar100] [--out FOLDER]

Every folder below the given ones that holds a metrics.csv is a run. It writes report.html, one
file that needs nothing else, and report.md with its pictures beside it. Runs that differ in the
seed alone are one row; those that are unfinished, diverged, of another data set or there twice are
listed and in no number.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting.render import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, help="where to write; default: the first folder given")
    parser.add_argument("--data", metavar="NAME", help="default: the data set of most runs")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0]
    try:
        print(report(arguments.runs, out, arguments.data))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print(f"written: {out / 'report.html'}, {out / 'report.md'}")


if __name__ == "__main__":
    main()
