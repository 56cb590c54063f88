"""Turn finished runs into a report on whether attention helps: report.html and report.md.

    python scripts/report.py outputs/compare/NAME
    python scripts/report.py outputs --data cifar100 --out report

The given folders are searched at all levels; a folder with a metrics.csv, a summary.json, a
failed.json or a checkpoint is a run. report.html is a single file that needs no other; report.md
has its pictures next to it. Runs that differ only in the seed form one variant. Runs that are
unfinished, diverged, unreadable, duplicates or of another data set are listed, and are not part of
any number.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting.render import report
from reporting.text import printable


def main() -> None:
    set_up_console()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="FOLDER", help="run folders, or folders above them"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write; default: the first FOLDER"
    )
    parser.add_argument(
        "--data", metavar="NAME", help="cifar100, cifar10, ...; default: that of most runs"
    )
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0]
    try:
        print(report(arguments.runs, out, arguments.data))
    except (ValueError, OSError) as error:
        sys.exit("report.py: " + printable(str(error)).replace("\n", " "))
    print(printable(f"written: {out / 'report.html'}, {out / 'report.md'}"))


def set_up_console() -> None:
    """UTF-8 on stdout and stderr, whatever the locale says."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


if __name__ == "__main__":
    main()
