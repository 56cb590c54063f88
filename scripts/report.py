"""Turn finished runs into a report on whether attention helps: report.html and report.md.

    python scripts/report.py outputs/compare/NAME
    python scripts/report.py outputs --data cifar100 --out report
    python scripts/report.py outputs/compare/NAME --wandb

The given folders are searched at all levels; a folder with a metrics.csv, a summary.json, a
failed.json or a checkpoint is a run. report.html is a single file that needs no other; report.md
has its pictures next to it. Runs that differ only in the seed form one variant. Runs that are
unfinished, diverged, unreadable, duplicates or of another data set are listed, and are not part of
any number. --wandb gives the dashboard the same as one run of job type "compare".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import console

if __name__ == "__main__":
    console.prepare("report.py")

import argparse
import logging

from reporting import dashboard, render
from reporting.analysis import analyze
from reporting.text import printable


def main() -> None:
    console.ready()
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
    parser.add_argument("--wandb", action="store_true", help="also to the dashboard")
    parser.add_argument("--project", default="aaconv", help="there (default: aaconv)")
    parser.add_argument("--entity", help="user or team there (default: that of the account)")
    parser.add_argument(
        "--mode",
        choices=("auto", "online", "offline"),
        default="auto",
        help="auto: online with credentials, else kept on disk",
    )
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0]
    try:
        analysis = analyze(arguments.runs, arguments.data)
        print(render.write(analysis, out))
    except (ValueError, OSError) as error:
        console.stop("report.py", printable(console.one_line(error)), 1)
    except KeyboardInterrupt:
        console.stop("report.py", "interrupted", 130)
    print(printable(f"written: {out / 'report.html'}, {out / 'report.md'}"))
    if arguments.wandb:
        logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
        dashboard.post(
            analysis,
            out / "report.html",
            out_dir=out,
            group=out.absolute().name,
            project=arguments.project,
            entity=arguments.entity,
            mode=arguments.mode,
        )


if __name__ == "__main__":
    main()
