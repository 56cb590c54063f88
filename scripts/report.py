"""Turn finished runs into a report on whether attention helps: report.html and report.md.

    python scripts/report.py outputs/compare/NAME
    python scripts/report.py outputs --data cifar100 --out report
    python scripts/report.py outputs/compare/NAME --wandb

The given folders are searched at all levels; a folder with a metrics.csv, a summary.json, a
failed.json or a checkpoint is a run. report.html is a single self-contained file; report.md has
its pictures next to it. Runs that differ only in the seed form one variant. Runs that are
unfinished, diverged, unreadable, duplicates or of another data set are listed but are not part of
any number. --wandb posts the report to the dashboard, too, as one run of job type "compare".
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import PROJECT, check_out, command, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="FOLDER", help="run folders, or folders above them"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write; default: the first FOLDER"
    )
    parser.add_argument(
        "--data", metavar="NAME", help="cifar100, cifar10, ...; default: that of most runs"
    )
    parser.add_argument("--wandb", action="store_true", help="also post it to wandb")
    parser.add_argument("--project", default=PROJECT, help=f"wandb project (default: {PROJECT})")
    parser.add_argument("--entity", help="wandb user or team (default: the account's)")
    parser.add_argument(
        "--mode",
        choices=("auto", "online", "offline"),
        default="auto",
        help="auto: online with credentials, else kept on disk",
    )


if __name__ == "__main__":
    start(__file__, options)

import logging

from reporting import dashboard, render
from reporting.analysis import analyze
from reporting.text import printable


@command(options)
def main(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_out(args.out)
    out = args.out or args.runs[0]
    analysis = analyze(args.runs, args.data)
    print(render.write(analysis, out))
    print(printable(f"written: {out / 'report.html'}, {out / 'report.md'}"))
    if args.wandb:
        logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
        dashboard.post(
            analysis,
            out / "report.html",
            out_dir=out,
            group=out.absolute().name,
            project=args.project,
            entity=args.entity,
            mode=args.mode,
        )
