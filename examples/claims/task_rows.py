"""Tune and train rows of compare.py on a task, for equal steps: what scripts of claims share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from examples.common.tuning import edges
from examples.compare.protocol import Method, choose, columns
from examples.compare.runs import make_functions, make_trainer
from examples.compare.task import Task

TRIALS = 12  # candidates of a search, and more while it is not at its end


def train_rows(
    tasks: Mapping[str, Task],
    wanted: Sequence[tuple[str, str]],
    steps: int,
    look: Callable[[Method], Callable[[Any, Any], Any]] = lambda method: method.result,
    trials: int = TRIALS,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Choose the numbers of each row on the validation split, and train the reported seeds.

    Args:
        tasks: The tasks, by name.
        wanted: Names of a task and of a row of it.
        steps: Steps of every training.
        look: What is measured after a training, such as `Method.measure`; default: accuracy and
            loss on the test split.
        trials: Candidates that a search tries at least.

    Returns:
        For each task and row the chosen numbers, and the measures with a number for each seed.
    """
    found = {}
    with tqdm(unit=" runs", smoothing=0.1, disable=None) as bar:
        for name, row in wanted:
            task = tasks[name]
            bar.set_description(f"{name}, {row}")

            def advance(_: str, runs: int) -> None:
                bar.update(runs)

            method = Method(
                task,
                row,
                make_trainer(task, row),
                make_functions(task),
                advance,
            )
            tried, best = choose(method, steps, trials)
            measures, spent = method.run(range(task.seeds), [best], steps, look(method), "seeds")
            found[name, row] = {
                **dict(zip(("learning_rate", "rho"), best, strict=True)),
                "edges": edges(best, tried),
                "gradients": float(spent.mean()),
                "measures": columns(measures),
            }
    return found
