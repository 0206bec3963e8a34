"""What every script tells: the device at the start, results.json, and where all of it went."""

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from platform import machine, python_version
from typing import Any

import jax
import numpy as np

import samx
from examples.common import files
from examples.common.versions import versions

NOT_SETTINGS = ("folder", "out")
MARK = "*: at an edge of the values that were tried; a better value may lie beyond"


class Report:
    """The report of one run of a script: `args.folder` gets results.json and plots.

    It prints the device and the versions, and the clock starts.

    Args:
        args: The arguments of the script; `args.folder` exists.
        device: Description of the devices; by default the first one.
        left_out: Names of arguments that are no settings of the run.
    """

    def __init__(
        self, args: argparse.Namespace, device: str | None = None, left_out: Sequence[str] = ()
    ):
        device = device or describe_device()
        print(f"device: {device}, jax {jax.__version__}, samx {samx.__version__}")
        names = vars(args).keys() - {*NOT_SETTINGS, *left_out}
        self.folder = args.folder
        self.settings = {name: value for name, value in vars(args).items() if name in names}
        self._about = {"device": device, "jax": jax.__version__, "samx": samx.__version__}
        self._start = time.perf_counter()

    def save(self, **results: Any) -> None:
        """Write results.json: the device, the settings and the results.

        Raises:
            SaveError: If the file cannot be written.
        """
        text = json.dumps(
            without_nans({**self._about, "settings": self.settings, **results}), indent=1
        )
        files.write(self.folder / "results.json", text)

    def end(self, *plots: str) -> None:
        """Print how long it took, and where the results and the plots are."""
        seconds = time.perf_counter() - self._start
        print(f"\n{seconds:.0f} s in all. Results: {self.folder / 'results.json'}")
        for plot in plots:
            print(f"Plot: {self.folder / plot}")


def as_summary(command: str, settings: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """Return what tables and figures need of results, as JSON with one row on each line."""
    about = {
        "command": command,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {machine()}",
        "versions": {"python": python_version(), **versions()},
        "settings": settings,
    }
    lines = [json.dumps(without_nans(row)) for row in rows]
    head = json.dumps(about, indent=1).removesuffix("\n}")
    return f'{head},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def describe_device() -> str:
    """Describe the first device."""
    return f"{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)"


def aligned(grid: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column starts at the left, the others end together."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in grid
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is NaN."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def marked(result: Mapping[str, Any], name: str) -> str:
    """Format a tuned number, with a star if `result["edges"]` names it."""
    return f"{result[name]:g}" + "*" * (name in result["edges"])


def without_nans(tree: Any) -> Any:
    """Replace numbers that are not finite by None, because JSON cannot hold them."""
    if isinstance(tree, dict):
        return {name: without_nans(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nans(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
