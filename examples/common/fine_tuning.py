"""What `fine_tune.py` asks of a problem: its rows, how it is measured, and how it is run.

This module is imported before the arguments are parsed, so it does not import jax.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

BITS = (8, 4, 3)  # to which the weights are rounded
BASELINES = ("adamw", "adamw2x")
ADAPTATIONS = ("whole", "lora", "head")

# Defaults of the command line: reported seeds, steps of the fine-tuning and of the pre-training,
# and width of the model, by `--task`.
DEFAULTS = {
    "images": {"seeds": 10, "steps": 400, "pretraining": 500, "width": 64},
    "mnist": {"seeds": 10, "steps": 400, "pretraining": 500, "width": 64},
    "language": {"seeds": 3, "steps": 200, "pretraining": 600, "width": 64},
}


class Row(NamedTuple):
    """One way to fine-tune.

    Attributes:
        adapt: What is trained: the whole model, low-rank adapters, or the head alone.
        method: Name of the optimizer.
        gradients: Gradients per step.
        times: Factor on the number of steps.
    """

    adapt: str
    method: str
    gradients: float
    times: int = 1

    @property
    def is_radius_tuned(self) -> bool:
        """Whether the method has a radius."""
        return self.method not in BASELINES


def _rows() -> dict[str, Row]:
    whole = {
        **{"adamw": 1.0, "adamw2x": 1.0, "sam": 2.0, "late-sam": 1.5},
        **{"functional-sam": 2.0, "logits-sam": 1.0, "sl-sam": 1.5},
    }
    lora = {
        **{"adamw": 1.0, "adamw2x": 1.0, "sam": 2.0, "merged-sam": 2.0},
        **{"flat-lora": 1.0, "bi-lora": 1.0, "functional-sam": 2.0, "logits-sam": 1.0},
    }
    head = {"adamw": 1.0, "adamw2x": 1.0, "sam": 2.0}
    return {
        f"{adapt} {method}": Row(adapt, method, gradients, 1 + (method == "adamw2x"))
        for adapt, methods in {"whole": whole, "lora": lora, "head": head}.items()
        for method, gradients in methods.items()
    }


ROWS = _rows()


class Problem(NamedTuple):
    """A pre-trained model, two tasks, and the ways to fine-tune it.

    `make_problem(args)` of `fine_tune_images.py` and `fine_tune_language.py` returns one. It uses
    `args.task`, and what `DEFAULTS` has: `args.seeds`, `steps`, `pretraining` and `width`.

    Attributes:
        title: What is learned first and then, for the table and the figure.
        rows: The rows by their names; those of `ROWS` that make sense here.
        measure: What is reported of both tasks, "accuracy" or "loss".
        rates: Where the search of the learning rate begins, by `Row.adapt`.
        radii: Where the search of the radius begins, by the name of the row.
        decades: How far the search of the radius goes in each direction; below is only 0.
        tuning_seeds: Seeds with which candidates are compared; none of them is reported.
        before: `seeds -> measures`, one dict per seed, before the fine-tuning: those of `run` on
            the test split, except "new_...", "gradients" and "seconds".
        run: `(row, rate, rho, seeds, split) -> measures`, one dict per seed. On the split
            "validation" it has at least "new_loss", by which candidates are compared. On the split
            "test" it has

            - "new_loss", "old_loss", and "new_accuracy", "old_accuracy" if it measures those, on
              held-out examples of the new and of the old task,
            - the same after the deployed weights are rounded: "new_loss_4_bits" for each of `BITS`,
            - "top_eigenvalue" and "rise": sharpness of the training loss of the new task, in the
              deployed (merged) weights,
            - "gradients" and "seconds" of the fine-tuning.
    """

    title: str
    rows: Mapping[str, Row]
    measure: str
    rates: Mapping[str, float]
    radii: Mapping[str, float]
    tuning_seeds: Sequence[int]
    before: Callable[[Sequence[int]], list[dict[str, Any]]]
    run: Callable[[Row, float, float, Sequence[int], str], list[dict[str, Any]]]
    decades: int = 3
