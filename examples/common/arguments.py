"""Command lines of the examples: the same checks with the same messages in every script."""

import argparse
import math
from pathlib import Path

import numpy as np

from examples.common.output import free_folder, lock


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of a script, line by line."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def check_range(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    *names: str,
    low: float = 1,
    high: float = math.inf,
) -> None:
    """Refuse a number outside `low` to `high`, also one of a list; `None` is not checked."""
    limit = high if isinstance(high, int) else f"{high:g}"
    wanted = f"at least {low:g}" if high == math.inf else f"{low:g} to {limit}"
    for name in names:
        for value in _values(args, name):
            if not low <= value <= high:
                parser.error(f"{_option(name)} must be {wanted}, got {value}")


def check_share(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse a number outside [0, 1)."""
    for name in names:
        for value in _values(args, name):
            if not 0 <= value < 1:
                parser.error(f"{_option(name)} must be in [0, 1), got {value}")


def check_finite(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    *names: str,
    above_zero: bool = False,
) -> None:
    """Refuse a number that is negative or not finite; with `above_zero`, also 0."""
    wanted = "finite and above 0" if above_zero else "finite and at least 0"
    for name in names:
        for value in _values(args, name):
            if not 0 <= value < math.inf or (above_zero and value == 0):
                parser.error(f"{_option(name)} must be {wanted}, got {value}")


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Add --out; `choose_folder` gets the same name."""
    text = f"new or empty folder for the results; default: runs/{name}-NNN"
    parser.add_argument("--out", metavar="FOLDER", help=text)


def choose_folder(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
    """Set and lock `args.folder`: --resume, --out or a new one; call it after all other checks."""
    option = "--out" if getattr(args, "resume", None) is None else "--resume"
    try:
        if option == "--out":
            args.folder = free_folder(args.out, name)
        else:
            args.folder = Path(args.resume)
            lock(args.folder)
    except (OSError, ValueError) as error:
        parser.error(f"{option}: {error}")


def _values(args: argparse.Namespace, name: str) -> list[float]:
    value = getattr(args, name)
    return [] if value is None else np.atleast_1d(value).tolist()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
