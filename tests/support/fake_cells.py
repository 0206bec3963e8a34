"""Cells as compare.py writes them, with made-up numbers, for what reads them."""

import json

import numpy as np

SHARP = ("top_eigenvalue", "trace", "worst_case", "adaptive_worst_case", "m_sharpness")
ROWS = ("base", "base2x", "sam", "asam", "looksam", "lpf-sgd")
COST = {"base": 1, "base2x": 1, "looksam": 1.2, "lpf-sgd": 1, "lookbehind-sam": 6}


def fake_cell(task, row, scores, tier=1, main="accuracy", **more):
    """Return a cell with these accuracies, or losses, one for each seed."""
    scores = np.asarray(scores, float)
    rng = np.random.default_rng([*map(ord, task + row)])
    gradients = 400 if row == "base" else 800
    steps = round(gradients / COST.get(row, 2))
    loss = scores if main == "loss" else 1.2 - scores
    measures = {
        **{"test_accuracy": 1.2 - loss, "test_loss": loss},
        **{"train_accuracy": 1 - loss / 9, "train_loss": loss / 3 * rng.uniform(0.9, 1.1)},
        **{"calibration_error": loss / 4, "test_loss_input_noise": 2 * loss},
        **{"test_loss_4_bits": 1.1 * loss, "test_loss_3_bits": 1.5 * loss},
        **{name: 30 * loss**2 * rng.uniform(0.8, 1.2, len(loss)) for name in SHARP},
    }
    found = {
        **{"task": task, "row": row, "tier": tier, "main": main, "seeds": len(scores)},
        **{"trials": 16, "budget": 800, "learning_rate": 0.1, "rho": 0.2, "edges": []},
        **{"steps": steps, "gradients": float(gradients), "milliseconds_per_step": 0.14},
        **{"time_of_base_step": COST.get(row, 2) * rng.uniform(0.9, 1.1), "bytes": 123456},
        **{"candidates": [[0.1, 0.2, 0.93]], "seconds": 12.0, "versions": {}, "device": "cpu"},
        "measures": {name: values.tolist() for name, values in measures.items()},
    }
    if not row.startswith("base"):
        equal = {name: measures[name].tolist() for name in ("test_accuracy", "test_loss")}
        found["equal_time"] = {"steps": steps + 5, **equal}
    return found | more


def fake_tasks(tasks=("one", "two"), rows=ROWS, seeds=4, main="accuracy", tier=1):
    """Return cells whose rows differ, and whose seeds differ in the same way for all rows."""
    for number, task in enumerate(tasks):
        rng = np.random.default_rng(number)
        level, by_row = rng.normal(0, 0.01, seeds), rng.normal(0, 0.01, len(rows))
        for row, shift in zip(rows, by_row, strict=True):
            scores = 0.9 + level + shift + rng.normal(0, 0.003, seeds)
            yield fake_cell(task, row, scores if main == "accuracy" else 1.2 - scores, tier, main)


def write_cells(folder, cells):
    """Write cells as compare.py does, and return the folder."""
    for cell in cells:
        path = folder / cell["task"] / f"{cell['row']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cell))
    return folder
