"""The command line of the scripts that read the results of compare.py."""

import argparse
from pathlib import Path

from examples.common import arguments

RESULTS = Path(__file__).parent / "results" / "cells"


def parse_results(doc: str | None, name: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse --results and --out.

    Args:
        doc: The docstring of the script.
        name: First part of the name of a chosen folder.
        argv: The arguments.
    """
    parser = arguments.new_parser(doc)
    text = "folder with TASK/ROW.json; default: the committed results"
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=text)
    arguments.add_out(parser, name)
    return parser.parse_args(argv)
