"""The protocol of the comparison: how a cell is made, one method on one task with all its seeds.

1. The gradients of a step are counted in a pilot run.
2. Learning rate and main radius are searched on the validation split. The best `FINALISTS`
   candidates are tried again with more seeds, and the best of them is chosen.
3. The reported seeds train at equal gradients, with the chosen values, and are measured.
4. A step is timed in turn with one of the base optimizer. The reported seeds train again at equal
   time: as many steps as fit into the time of `base2x`.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.common.training import map_runs, row_of
from examples.common.tuning import (
    SIXTHS,
    THIRDS,
    TUNING_SEEDS,
    Axis,
    Runs,
    around,
    best_of,
    edges,
    fixed,
    from_zero,
    runs_of,
    search,
)
from examples.compare.rows import BASELINES, variants_of
from examples.compare.runs import (
    BLOCK,
    Functions,
    Trainer,
    batches_of,
    make_functions,
    make_trainer,
    spent_by,
    train_run,
)
from examples.compare.task import Task

FINALISTS = 4  # candidates that are tried with `FINAL_SEEDS` times as many seeds
FINAL_SEEDS = 3
ROUNDS = 20  # in which steps are timed, and as many steps of the base optimizer

Candidate = tuple[float, ...]  # learning rate and radius


class Method(NamedTuple):
    """A method on a task.

    Attributes:
        task: The task.
        row: The name of the method.
        trainer: Its compiled functions.
        functions: Those of the task's network.
        advance: `(what, runs)`, called after every run.
    """

    task: Task
    row: str
    trainer: Trainer
    functions: Functions
    advance: Callable[[str, int], None]

    def run(
        self,
        seeds: Sequence[int],
        candidates: Sequence[Candidate],
        steps: int,
        look: Callable[[Any, Any], Any],
        what: str,
    ) -> tuple[Any, np.ndarray]:
        """Train every candidate with every seed.

        Args:
            seeds: The seeds.
            candidates: The candidates.
            steps: Steps of each run.
            look: `(params, splits) -> numbers`, called after each run.
            what: What the runs are for, for the progress bar.

        Returns:
            What `look` returned, and the gradients spent, by run; the seed varies fastest.
        """

        def of_run(run):
            params, state = train_run(self.task, self.trainer, run, steps)
            return look(params, self.task.data(int(run.seed))), spent_by(state, steps)

        runs = Runs(*runs_of(seeds, candidates))
        return map_runs(of_run, runs, advance=partial(self.advance, what))

    def result(self, params: Any, splits: Any) -> dict[str, Any]:
        """Return accuracy and loss on the test split."""
        found = self.functions.result(params, splits.train, splits.test)
        return {f"test_{name}": found[name] for name in ("accuracy", "loss")}

    def measure(self, params: Any, splits: Any) -> dict[str, Any]:
        """Return all measures."""
        return self.functions.measure(params, splits.train, splits.test)


def make_method(task: Task, row: str, base: Trainer, advance: Callable[[str, int], None]) -> Method:
    """Compile a method; both baselines share the trainer of the base optimizer."""
    trainer = base if row in BASELINES else make_trainer(task, row)
    return Method(task, row, trainer, make_functions(task), advance)


def axes_of(task: Task, row: str) -> list[Axis]:
    """Return the axes of learning rate and radius; a row without a radius has a finer first one."""
    variant = variants_of(task)[row]
    rate = variant.learning_rate or task.learning_rate
    if not variant.start:
        return [around(rate, SIXTHS), fixed([0.0])]
    return [around(rate, THIRDS), from_zero(around(variant.start, decades=2))]


def one_run(seed: int, candidate: Candidate) -> Runs:
    return row_of(Runs(*runs_of([seed], [candidate])), 0)


def tune_cell(method: Method, trials: int) -> dict[str, Any]:
    """Choose the numbers of a method.

    Args:
        method: The method.
        trials: Candidates that are tried at least.
    """
    steps, held = steps_and_bytes(method)
    tried, best = choose(method, steps, trials)
    return {
        **dict(zip(("learning_rate", "rho"), best, strict=True)),
        "edges": edges(best, tried),
        "candidates": [[*candidate, round_to(score)] for candidate, score in tried.items()],
        "steps": steps,
        "bytes": held,
    }


def measure_cell(method: Method, cell: dict[str, Any]) -> dict[str, Any]:
    """Train the reported seeds with the chosen numbers of a method, and measure.

    Args:
        method: The method.
        cell: What `tune_cell` returned for it.
    """
    best, steps = (cell["learning_rate"], cell["rho"]), cell["steps"]
    measures, spent = method.run(range(method.task.seeds), [best], steps, method.measure, "seeds")
    return {"gradients": round_to(np.mean(spent)), "measures": columns(measures)}


def steps_and_bytes(method: Method) -> tuple[int, int]:
    """Return the steps that spend the budget, and the bytes of the optimizer's state."""
    task = method.task
    candidate = tuple(axis.values[axis.start] for axis in axes_of(task, method.row))
    pilot = max(1, task.budget // 2)
    run = one_run(TUNING_SEEDS.start, candidate)
    _, state = train_run(task, method.trainer, run, pilot)
    # `base` gets as many steps as SAM.
    gradients = 2.0 if method.row == "base" else spent_by(state, pilot) / pilot
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return max(1, round(task.budget / gradients)), held


def choose(method: Method, steps: int, trials: int) -> tuple[dict[Candidate, float], Candidate]:
    """Return the score of every candidate that was tried, and the one that is chosen."""
    task = method.task

    def scores(candidates, seeds):
        """Return the validation scores [candidates, seeds]; what is not finite is the worst."""

        def look(params, splits):
            return method.functions.result(params, splits.train, splits.validation)[task.main]

        found, _ = method.run(seeds, candidates, steps, look, "tuning")
        found = np.reshape(found if task.main == "accuracy" else -found, (len(candidates), -1))
        return np.where(np.isfinite(found), found, -np.inf).tolist()

    first = range(TUNING_SEEDS.start, TUNING_SEEDS.start + task.tuning_seeds)
    more = range(first.stop, first.start + FINAL_SEEDS * task.tuning_seeds)
    known: dict[Candidate, list[float]] = {}

    def evaluate(candidates):
        known.update(zip(candidates, scores(candidates, first), strict=True))
        return [float(np.mean(known[candidate])) for candidate in candidates]

    finalists = finalists_of(search(axes_of(task, method.row), evaluate, trials))
    for candidate, others in zip(finalists, scores(finalists, more), strict=True):
        known[candidate] += others
    tried = {candidate: float(np.mean(found)) for candidate, found in known.items()}
    return tried, max(finalists, key=lambda candidate: tried[candidate])


def finalists_of(tried: dict[Candidate, float]) -> list[Candidate]:
    """Return the best candidate, and the next ones that are not at an edge of what was tried."""
    best = best_of(tried)
    others = [one for one in tried if one != best and not edges(one, tried)]
    others.sort(key=lambda candidate: -tried[candidate])
    return [best, *others[: FINALISTS - 1]]


def time_cell(method: Method, base: Trainer, cell: dict[str, Any]) -> dict[str, Any]:
    """Time the steps of a method, and train its reported seeds again at equal time.

    Nothing else should run on the machine. Of `ROUNDS` times the shortest counts: the others were
    disturbed.

    Args:
        method: The method.
        base: The trainer of the base optimizer.
        cell: What `tune_cell` returned for the method.
    """
    task, best = method.task, (cell["learning_rate"], cell["rho"])
    run = one_run(0, best)
    data, batches = task.data(0).train, batches_of(task, 0, BLOCK)
    starts = [train_run(task, trainer, run, BLOCK) for trainer in (method.trainer, base)]

    def seconds_of(trainer, start):
        begin = time.perf_counter()
        jax.block_until_ready(trainer.train(cell["steps"], *start, run, data, batches, BLOCK))
        return time.perf_counter() - begin

    mine, others = np.min(
        [list(map(seconds_of, (method.trainer, base), starts)) for _ in range(ROUNDS)], axis=0
    )
    found: dict[str, Any] = {
        "milliseconds_per_step": round_to(1e3 * mine / BLOCK),
        "time_of_base_step": round_to(mine / others),
    }
    if method.row not in BASELINES:
        steps = max(1, round(task.budget * others / mine))
        again, _ = method.run(range(task.seeds), [best], steps, method.result, "equal time")
        found["equal_time"] = {"steps": steps, **columns(again)}
    return found


def columns(measures: dict[str, Any]) -> dict[str, list[float]]:
    """Return the measures of all seeds as lists of numbers with six digits."""
    return {name: [round_to(x) for x in values] for name, values in measures.items()}


def round_to(number: Any, digits: int = 6) -> float:
    """Round a number to so many significant digits."""
    return float(f"{float(number):.{digits}g}")
