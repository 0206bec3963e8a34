"""Measure time and memory of an exchange with the center, with threads and with Ray.

    python examples/asynchronous/exchange_cost.py     # 25 million parameters, about a minute
    python examples/asynchronous/exchange_cost.py --millions 1 --engine threads --workers 1 4

The workers only exchange: their step changes nothing, and every step has an exchange. The time is
measured in a worker from one step to the next. It includes the copies from jax's arrays to a flat
array and back. The memory is the largest value seen for each process: its own memory (USS), and in
brackets its memory including what it shares with others (RSS), such as the messages in Ray's object
store. With threads there is only this process. The script prints a table. It writes results.json
and exchange_cost.png to --out.
"""

import argparse
import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.common import arguments

ENGINES = ("threads", "ray")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--millions", type=int, default=25, help="parameters; default: 25")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[1, 2], help="shards of Ray's center"
    )
    parser.add_argument("--repeats", type=int, default=15, help="exchanges of each worker")
    arguments.add_out(parser, "exchange-cost")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "millions", "workers", "shards", "repeats")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from tqdm import tqdm

from examples.common import figures, files
from examples.common.files import SaveError, reason
from examples.common.output import choose_folder
from examples.common.report import Report
from samx import elastic

MILLION = 1_000_000
SKIPPED = 2  # a worker's first exchanges are slower: they allocate their memory


def exchanging(millions: int, folder: Path) -> Callable[[int], elastic.Worker]:
    """Return a `make_worker`; its workers save the times of their steps."""

    def make_worker(index: int) -> elastic.Worker:
        def batches(start: int):
            times: list[float] = []
            for number in itertools.count(start):
                times.append(time.perf_counter())
                if len(times) > 1:
                    with contextlib.suppress(OSError):  # `read_times` will tell
                        np.save(folder / f"{index}.npy", times)
                yield number

        params = zeros(millions)
        return elastic.Worker(
            params, lambda params: None, lambda w, state, _: (w, state, 0.0), batches
        )

    return make_worker


def read_times(folder: Path, workers: int) -> np.ndarray:
    """Return the seconds of all exchanges but the first ones of each worker."""
    seconds = []
    for index in range(workers):
        path = folder / f"{index}.npy"
        try:
            times = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            text = f"{path}: the times of worker {index} could not be written or read"
            raise SaveError(f"{text} ({reason(error)})") from error
        seconds.append(np.diff(times)[SKIPPED:])
    return np.concatenate(seconds)


def zeros(millions: int) -> dict[str, jax.Array]:
    """Return a model with this many million parameters."""
    return {f"layer {i}": jnp.zeros((1000, 1000)) for i in range(millions)}


class Memory:
    """The largest memory seen of some processes, in bytes: without and with shared memory."""

    def __init__(self):
        self.largest: dict[str, list[int]] = {}

    def look(self, name: str, pid: int) -> None:
        """Record the memory of a process, if the process exists."""
        try:
            info = psutil.Process(pid).memory_full_info()
        except psutil.Error:
            return
        seen = self.largest.get(name, [0, 0])
        self.largest[name] = [max(seen[0], info.uss), max(seen[1], info.rss)]

    def __call__(self, progress: elastic.Progress) -> None:
        """Record the memory of this process, of the first worker and of the center."""
        self.look("driver", os.getpid())
        if match := re.search(r" pid (\d+)", progress.workers[0].place):
            self.look("worker", int(match[1]))
            for process in psutil.process_iter(["name"]):
                if process.info["name"].startswith("ray::Shard"):
                    self.look("center", process.pid)


def measure(
    engine: str, workers: int, shards: int, args: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """Measure one row of the table."""
    folder = args.folder / f"{engine}-{workers}-{shards}"
    folder.mkdir()
    memory, seen = Memory(), 0

    def monitor(progress: elastic.Progress) -> None:
        nonlocal seen
        memory(progress)
        bar.update(progress.exchanges - seen)
        seen = progress.exchanges

    begin = time.perf_counter()
    trained = elastic.train(
        exchanging(args.millions, folder),
        zeros(args.millions),
        num_workers=workers,
        num_exchanges=exchanges_of(workers, args),
        rule=elastic.Rule(period=1),
        engine=elastic.Threads() if engine == "threads" else elastic.Ray(num_shards=shards),
        monitor=monitor,
        monitor_every=0.2,
    )
    return {
        **{"engine": engine, "workers": workers, "shards": shards},
        "milliseconds": (1000 * read_times(folder, workers)).tolist(),
        "megabytes": {k: [x / MILLION for x in v] for k, v in memory.largest.items()},
        "seconds_to_start": time.perf_counter() - begin - trained.progress.seconds,
    }


def exchanges_of(workers: int, args: argparse.Namespace) -> int:
    return workers * (args.repeats + SKIPPED)


HEADER = ("engine", "workers", "shards", "ms [quartiles]", "center MB", "worker MB", "driver MB")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of one row of the table."""
    low, middle, high = np.percentile(row["milliseconds"], [25, 50, 75])
    sizes = [
        "{:.0f} ({:.0f})".format(*row["megabytes"][name]) if name in row["megabytes"] else ""
        for name in ("center", "worker", "driver")
    ]
    times = f"{middle:.0f} [{low:.0f}, {high:.0f}]"
    return row["engine"], str(row["workers"]), str(row["shards"]), times, *sizes


def table(rows: list[dict[str, Any]]) -> str:
    grid = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in grid)


def plot(rows: list[dict[str, Any]], millions: int, path: Path) -> None:
    """Plot a bar with quartiles for each row."""
    figure = figures.make_figure(1.5, [figures.height_of(len(rows))])
    axes = figure.subplots()
    names = [f"{r['engine']}, workers {r['workers']}, shards {r['shards']}" for r in rows]
    quartiles = [np.percentile(row["milliseconds"], [25, 50, 75]) for row in rows]
    low, middle, high = np.transpose(quartiles)
    colors = [figures.COLORS[ENGINES.index(row["engine"])] for row in rows]
    axes.barh(names, middle, color=colors, xerr=[middle - low, high - middle], capsize=2)
    for place, (end, value) in enumerate(zip(high, middle, strict=True)):
        shift = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.3g}", (end, place), **shift)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms for an exchange, median and quartiles")
    ends = dict.fromkeys(f"{value:.3g}" for value in (min(middle), max(middle)))
    title = f"An exchange of {millions} million parameters takes {' to '.join(ends)} ms"
    figures.save(figure, path, title)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    choose_folder(args, "exchange-cost")
    report = Report(args)
    settings = [
        (engine, workers, shards)
        for engine in dict.fromkeys(args.engine)
        for workers in dict.fromkeys(args.workers)
        for shards in (dict.fromkeys(args.shards) if engine == "ray" else [1])
    ]
    total = sum(exchanges_of(workers, args) for _, workers, _ in settings)
    with tqdm(total=total, unit=" exchanges", disable=None) as bar:
        rows = [measure(*setting, args, bar) for setting in settings]
    print(f"\n{args.millions} million float32 parameters\n\n{table(rows)}\n")
    report.save(rows=rows)
    plot(rows, args.millions, args.folder / "exchange_cost.png")
    report.end("exchange_cost.png")
    return rows


if __name__ == "__main__":
    main()
