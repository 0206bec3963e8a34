"""Command lines of the examples: the same checks with the same messages in every script.

A script parses its arguments before it imports jax, which takes seconds. So this module imports
nothing but the standard library.
"""

import argparse
import math
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from examples.common.choices import BASES


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the description, and the names with hyphens whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of a script, line by line."""
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)


def add_names(
    parser: argparse.ArgumentParser,
    option: str,
    names: Sequence[str],
    text: str = "",
    **keywords: Any,
) -> None:
    """Add an option that takes one of many names, or some; --help lists them once, before `text`.

    `argparse` alone would list them in the usage too, and several times.
    """
    listed = f"{', '.join(names)}{text}"
    parser.add_argument(option, choices=names, metavar="NAME", help=listed, **keywords)


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


def add_monitor(parser: argparse.ArgumentParser, where: str) -> None:
    """Add --monitor; `where` tells on which examples and when a script measures."""
    text = "every so many steps measure the top eigenvalue of the Hessian, with its error, and the "
    text += f"rise of the loss: {where}; it costs about 40 gradients; default: 0, never"
    parser.add_argument("--monitor", type=int, default=0, metavar="EVERY", help=text)


def add_settings(parser: argparse.ArgumentParser, seeds: int, name: str) -> None:
    """Add the arguments of digits.py and async_digits.py; `seeds` is the default number."""
    parser.add_argument("--base", choices=BASES, default="momentum")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--noise", type=float, default=0.3, help="share of flipped labels")
    parser.add_argument("--rho", type=float, nargs="+", help="candidate radii for every method")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    add_out(parser, name)


def check_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse numbers of `add_settings` that are out of range."""
    check_range(parser, args, "seeds", "epochs", "width")
    check_share(parser, args, "noise")
    check_finite(parser, args, "rho")


def refuse(message: str) -> NoReturn:
    """End the script as its parser would, for a reason that is known only after the imports."""
    argparse.ArgumentParser(usage=argparse.SUPPRESS).error(message)


def _values(args: argparse.Namespace, name: str) -> list[float]:
    value = getattr(args, name)
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
