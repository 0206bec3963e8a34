"""Compare every variant with tuned baselines at equal gradients: tasks x variants x seeds.

    python examples/compare/compare.py
    python examples/compare/compare.py --tier 2 --minutes 120
    python examples/compare/compare.py --tasks digits-noisy --rows base base2x sam --results mine

One cell is one method on one task, with all its seeds. Each cell is written to a small file,
FOLDER/TASK/ROW.json, when it is complete. A cell that is there is not made again: stop the command
whenever you like, and start it again. `tables.py` makes the tables and figures from the files.

The protocol. It was written before the runs; what was changed after a look at results, and why,
stands in notebooks/comparison.md.

- Equal gradients. Every method spends the same number of gradients, the budget of the task, each
  over one batch. A method with more gradients for each step takes fewer steps. How many a step
  takes is counted in a pilot run, because some methods decide that while they train; these come
  within 5% of the budget.
- Two baselines. `base2x` is the base optimizer with the whole budget, and `base` with half of it,
  which are as many steps as SAM takes. A method is compared with the better one on the test split
  of the task. If that favours anybody, it favours the baselines.
- Equal time, beside it. The time of a step is measured in turn with a step of the base. A method
  trains again for as many steps as fit into the time of `base2x`, with the same learning rate and
  radius. Where other programs ran, --again measures the times again, and all else but the tuning.
- Equal tuning. Learning rate and main radius are chosen on the validation split, with seeds that
  are not reported. Every method gets 16 trials; a method without a radius gets a finer grid of
  learning rates. The grid moves until the best candidate is in its interior, and goes on where
  the scores rise towards its end, which may take more trials. Then the four best candidates are
  tried with three times as many seeds, and the best of them is taken. A star marks a number at an
  edge of what was tried. The axis of the radius begins with 0, its natural end. Everything else has
  the default of the catalog, or of the examples' registry where the catalog has none.
- The test split is used with the chosen numbers and the reported seeds alone. Every seed has its
  own split, wrong labels, initialization and batches, the same for all methods; a method's own
  random numbers are other ones for each seed, too.
- The main result is the difference to the better baseline, paired by seed, with a bootstrap
  interval. The average rank over the tasks, with its interval, is the second. Nothing is called
  significant.
- First tier: every variant that fits the task, 20 seeds. Second tier: the baselines and 12 rows
  with 10 seeds: SAM, and the best row by mean rank in the first tier of each family of the catalog,
  the best families first. Third tier: the baselines, SAM, and the five other rows of the second
  tier with the best mean rank in both tiers, 5 seeds.

Beside accuracy a cell has losses, the calibration error, the test loss under noise on the inputs
and after rounding the weights to 4 and 3 bits, gradients, time, memory of the state, and sharpness
of the training loss: top eigenvalue and trace of the Hessian, the worst case in a ball and in an
adaptive ball, and m-sharpness. Not by seed, but for each candidate, it has the validation score.

The first tier takes about two hours on two CPU cores, and so do the others together.
"""

import argparse
from pathlib import Path
from typing import Any

from examples.common import arguments
from examples.compare.options import RESULTS

TRIALS = 16


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    text = "make the tasks of these tiers; default: 1"
    add("--tier", type=int, choices=(1, 2, 3), nargs="+", help=text)
    add("--tasks", nargs="+", metavar="NAME", help="make these tasks; default: those of the tier")
    text = "make these rows, chosen by the tier's rule or not; default: those of the tier"
    add("--rows", nargs="+", metavar="NAME", help=text)
    text = "where cells are; default: the committed ones"
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help=text)
    text = f"candidates of each search, at least; default: {TRIALS}"
    add("--trials", type=int, default=TRIALS, help=text)
    text = "train and measure the reported seeds of cells that are there again, as they are tuned"
    add("--again", action="store_true", help=text)
    add("--minutes", type=float, help="begin no cell after so many minutes")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "trials")
    arguments.check_finite(parser, args, "minutes", above_zero=True)
    if args.tier and args.tasks:
        parser.error("--tier: give either tiers or --tasks")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import json
import os
import sys
import time
from collections.abc import Iterator
from platform import machine, python_version

import jax
import numpy as np
from tqdm import tqdm

from examples.common import files
from examples.common.output import hold_results
from examples.common.report import without_nans
from examples.common.versions import versions
from examples.compare import protocol, runs
from examples.compare.cells import read_cell, read_cells, second_tier, third_tier
from examples.compare.rows import variants_of
from examples.compare.task import Task
from examples.compare.tasks import TASKS

CHOOSE = {2: second_tier, 3: third_tier}


def settings_of(name: str, row: str, trials: int) -> dict[str, Any]:
    """Return what a cell was made with; a file of other settings is not used."""
    task = TASKS[name]
    return {
        **{"task": name, "row": row, "tier": task.tier, "main": task.main},
        **{"seeds": task.seeds, "trials": trials, "budget": task.budget},
    }


def is_made(path: Path, settings: dict[str, Any]) -> bool:
    """Return whether a cell is there.

    Raises:
        ValueError: If the file is damaged, or was made with other settings.
    """
    if not path.exists():
        return False
    found = files.read_json(path)
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} has {name} {found.get(name)!r}, wanted {value!r}: "
                "take another --results, or remove it"
            )
    read_cell(path)
    return True


def rows_of(name: str, args: argparse.Namespace) -> list[str]:
    """Return the rows of a task: all that fit it, or those that the rule of its tier chooses.

    Raises:
        ValueError: If the tiers before are not complete.
    """
    task = TASKS[name]
    fitting = list(variants_of(task))
    if task.tier == 1 or args.rows:
        return fitting
    before = [other for other in TASKS if TASKS[other].tier < task.tier]
    if left := sum(1 for _ in wanted_cells(before, args)):
        raise ValueError(
            f"{name}: its rows are chosen from the tiers before, of which {left} cells are missing"
        )
    chosen = CHOOSE[task.tier](read_cells(args.results))
    return [row for row in fitting if row in chosen]


def runs_of_cell(task: Task, args: argparse.Namespace) -> int:
    """Return about how many runs a cell needs, for the progress bar."""
    if args.again:
        return 2 * task.seeds
    finals = (protocol.FINAL_SEEDS - 1) * min(args.trials, protocol.FINALISTS)
    return (args.trials + finals) * task.tuning_seeds + 2 * task.seeds


def make_cell(
    name: str, row: str, base: Any, args: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """Make and write one cell; with --again, train its reported seeds again."""
    task, begin = TASKS[name], time.perf_counter()

    def advance(what, count):
        bar.set_description(f"{name}, {row}, {what}")
        bar.update(count)

    method = protocol.make_method(task, row, base, advance)
    path = args.results / name / f"{row}.json"
    old = files.read_json(path) if args.again else {}
    found = old or protocol.tune_cell(method, args.trials)
    cell = {
        **settings_of(name, row, args.trials),
        **found,
        **protocol.measure_cell(method, found),
        **protocol.time_cell(method, base, found),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {machine()}",
        "versions": {"python": python_version(), **versions()},
    }
    seconds = old.get("seconds") or round(time.perf_counter() - begin, 1)
    cell = without_nans(cell | {"seconds": seconds})
    files.write(path, json.dumps(cell) + "\n")
    return cell


def line_of(cell: dict[str, Any]) -> str:
    """Describe a cell in one line."""
    main = f"test_{cell['main']}"
    values = [np.nan if x is None else x for x in cell["measures"][main]]
    return (
        f"{cell['task']}, {cell['row']}: {main.replace('_', ' ')} {np.mean(values):.4f}, "
        f"lr {cell['learning_rate']:g}, rho {cell['rho']:g}, {cell['seconds']:.0f} s"
    )


def wanted_cells(
    names: list[str], args: argparse.Namespace, is_there: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the task and row of every cell that is missing, or of every one that is there."""
    for name in names:
        for row in rows_of(name, args):
            is_wanted = not args.rows or row in args.rows
            path = args.results / name / f"{row}.json"
            if is_wanted and is_made(path, settings_of(name, row, args.trials)) == is_there:
                yield name, row


def check_names(args: argparse.Namespace) -> list[str]:
    """Return the names of the tasks; refuse unknown names."""
    tiers = args.tier or [1]
    names = args.tasks or [name for name, task in TASKS.items() if task.tier in tiers]
    known = [row for name in names if name in TASKS for row in variants_of(TASKS[name])]
    for option, given, wanted in (("--tasks", names, TASKS), ("--rows", args.rows or [], known)):
        for name in given:
            if name not in wanted:
                arguments.refuse(
                    f"{option}: unknown {name!r}; there are {', '.join(dict.fromkeys(wanted))}"
                )
    return [*dict.fromkeys(names)]


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> None:
    """Make the cells that are missing."""
    args = parse(argv)
    names = check_names(args)
    hold_results(args)
    try:
        wanted = list(wanted_cells(names, args, args.again))
        for name in dict(wanted):
            (args.results / name).mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        arguments.refuse(f"--results: {error}")
    print(f"{len(wanted)} cells to make in {args.results}")
    begin, failed, base, made = time.perf_counter(), [], {}, 0
    total = sum(runs_of_cell(TASKS[name], args) for name, _ in wanted)
    with tqdm(total=total, unit=" runs", smoothing=0.05, disable=None) as bar:
        for name, row in wanted:
            if args.minutes and time.perf_counter() - begin > 60 * args.minutes:
                break
            if name not in base:  # a new task: forget the programs of the last one
                jax.clear_caches()
                runs.make_functions.cache_clear()
                base = {name: runs.make_trainer(TASKS[name], "base")}
            try:
                cell = make_cell(name, row, base[name], args, bar)
            except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
                failed.append(f"{name}, {row}: {files.reason(error)}")
                bar.write(f"failed: {failed[-1]}")
                continue
            bar.write(line_of(cell))
            made += 1
    left = len(wanted) - made
    print(f"\n{made} cells made in {time.perf_counter() - begin:.0f} s, {left} left")
    print(f"Results: {args.results}")
    if failed:
        sys.exit("compare.py: failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
