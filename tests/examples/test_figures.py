"""Every figure of every script, with few rows and with all: nothing covers text, nothing is cut."""

import argparse
import ast
import itertools
from pathlib import Path

import drawn
import fake_directions
import jax
import numpy as np
import pytest
from fake_cells import ROWS, fake_tasks
from matplotlib.figure import Figure

from examples import digits
from examples.asynchronous import exchange_cost, faults
from examples.claims import (
    async_cost,
    async_long,
    averages,
    bsam,
    claim,
    committed,
    convergence,
    exact,
    gradient_directions,
    late_sam,
    lets,
    lightsam,
    long_tail,
    lsam,
    lsam_digits,
    mup_transfer,
    normalization,
    second_order,
    share_of_sam,
    snippets,
    stick_figures,
    strength,
    two_views,
    which_batch,
    wrong_labels,
)
from examples.common import figures, fine_tuning, monitoring
from examples.common.intervals import Interval
from examples.common.registry import VARIANTS
from examples.compare import (
    cells,
    comparison_figures,
    front_figure,
    overparameterization,
    overparameterization_report,
    sharpness_and_accuracy,
    tables,
)
from examples.cost import lean, step_cost
from examples.devices import (
    accelerator,
    accelerator_report,
    data_parallel,
    parallel_cost,
)
from examples.measure import (
    edge_of_stability,
    sharpness,
    sharpness_cost,
    sharpness_figure,
    sharpness_measures,
)
from examples.train import abstract, cifar, fine_tune, language_model, preference

EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


def some(*shape, low=0.9, high=0.97):
    return (low + (high - low) * RNG.random(shape)).tolist()


def rising(count, last):
    return (last * (1 - np.exp(-np.arange(1, count + 1)))).tolist()


def of_digits(rows, noises=(0.3, 0.0), seeds=3, monitored=0):
    for noise, row in itertools.product(noises, rows):
        accuracy = some(seeds, low=0.7 if row == "look-layer-sam" else 0.94)
        spent = 400.0 * VARIANTS[digits.ROWS[row][0]].gradients * digits.ROWS[row][1]
        yield {
            **{"row": row, "noise": noise, "test_accuracy": accuracy, "gradients": spent},
            "test_accuracy_by_epoch": rising(5, np.mean(accuracy)),
            "gradients_by_epoch": np.linspace(spent / 5, spent, 5).tolist(),
            **of_monitor(monitored, seeds),
        }


def draw_directions(path, seeds, language_seeds):
    epochs = gradient_directions.CHECKPOINTS
    runs = [fake_directions.measured(seed, epochs) for seed in range(seeds)]
    language = [fake_directions.of_language(seed, epochs) for seed in range(language_seeds)]
    measured = jax.tree.map(lambda *x: np.stack(x), *runs)
    measured["language"] = {"logit_share": np.stack(language)}
    values = {name: [0.1, 0.2] for name in gradient_directions.CLAIMS}
    gradient_directions.draw(measured, claim.found_of(gradient_directions.CLAIMS, values), path)


def of_monitor(count, seeds):
    """Return top eigenvalues of several sizes, or nothing."""
    steps = [100 * (1 + number) for number in range(count)]
    top = {"step": steps, "top_eigenvalue": some(count, seeds, low=0.01, high=80)}
    return {"monitored": top} if count else {}


def draw_digits(path, rows, noises=(0.3, 0.0), seeds=3, monitored=0):
    title = "Digits: momentum and its sharpness-aware versions, 20 seeds; ahead: by two "
    title += "standard errors or more"
    digits.draw([*of_digits(rows, noises, seeds, monitored)], [*noises], path, title)


def of_cells(*groups):
    """Return the cells of some tasks, by task and row."""
    tasks = {}
    for found in itertools.chain(*groups):
        cell = cells.as_cell(found, found["task"], found["row"])
        tasks.setdefault(cell.task, {})[cell.row] = cell
    return tasks


def draw_comparison(path, *groups):
    tasks = of_cells(*groups)
    summaries = {task: tables.summarize(found) for task, found in tasks.items()}
    comparison_figures.draw_comparison(tasks, summaries, path)


def draw_front(path, rows, seeds):
    front_figure.draw(of_cells(fake_tasks(["digits-noisy"], rows, seeds))["digits-noisy"], path)


def draw_ranking(path, *groups):
    comparison_figures.draw_ranking(tables.rankings_of(of_cells(*groups)), path)


def draw_sharpness_and_accuracy(path, *groups):
    found = sharpness_and_accuracy.over_all(of_cells(*groups), levels=["methods"], draws=20)
    sharpness_and_accuracy.draw(found, path)


def draw_long_tail(path, rows, imbalance, seeds):
    counts = long_tail.class_counts(imbalance)
    groups = {name: rows for name, rows in long_tail.groups_of(counts).items() if rows}
    results = []
    for row in rows:
        accuracy = np.array(some(seeds, 10, low=0.3))
        by_group = {name: accuracy[:, at].mean(axis=1).tolist() for name, at in groups.items()}
        results.append(
            {"row": row, "test_accuracy": accuracy.tolist(), "test_accuracy_by_group": by_group}
        )
    long_tail.draw(
        results, counts, path, "Long-tailed digits, imbalance 100, with a loss, 10 seeds"
    )


def draw_lets(path, noises, seeds):
    def end_of(count):
        numbers = {name: np.array(some(count, seeds)) for name in lets.End._fields}
        radii = 0.2 * np.array(some(count, seeds, 6, low=0.5))
        return lets.End(**numbers | {"rho": radii})

    def signs_of():
        numbers = np.array(some(seeds, 4, low=-1.0, high=1.0))
        horizons = {str(steps): numbers for steps in lets.HORIZONS}
        return lets.Signs(dict.fromkeys(lets.FORMS, numbers), numbers, horizons)

    def trained():
        return {"starts": [0.02, 0.2, 2.0], "ends": end_of(len(lets.FACTORS))}

    measured = [
        {
            **{"noise": noise, "sam": {"rho": 0.2}, "grid": end_of(len(lets.RADII))},
            **{"signs": signs_of(), "lets": {form: trained() for form in lets.TRAINED}},
        }
        for noise in noises
    ]
    lets.draw(measured, path)


def draw_normalization(path, rows, seeds):
    results = [
        {"row": row, "noise": normalization.NOISE, "test_accuracy": some(seeds)} for row in rows
    ]
    radii = len(normalization.RADII)
    grids = {arm: 100 * np.array(some(radii, seeds)) for arm in normalization.ON_GRID}
    normalization.draw(results, grids, path)


def draw_convergence(path, parts):
    """Draw curves that end at several places, two of them at the same."""
    methods, rates = list(convergence.PARALLEL), np.array(convergence.RATES)
    steps = np.arange(1, 4001)
    powers = dict(zip(methods, (1.1, 1.0, 0.95, 1.0, 0.5, 0.5), strict=True))
    names = [*convergence.LIGHT, "lightsam_adam, both"]
    rows = {
        "parallel": {
            "rates": rates.tolist(),
            "distances": {name: (rates**p).tolist() for name, p in powers.items()},
            "curves": {
                name: convergence.binned(6 * steps ** (-p / 2)).tolist()
                for name, p in powers.items()
            },
            "powers": {f"{name}, |x|²": [-p / 2] for name, p in powers.items()},
        },
        "lightsam": {"worst": {name: some(3, low=1e-4, high=0.1) for name in names}},
        "saddle": {
            "left": {f"{name}, {s}": 0.4 for name in convergence.FORMS for s in ("1", "30")}
        },
    }
    convergence.draw({part: rows[part] for part in parts}, path)


def draw_lightsam(path, points):
    results = []
    for method in lightsam.METHODS:
        ends = [None, 0.0, 1e-30, *some(points**2 - 3, low=1e-3, high=20)]
        rows = [
            {"norm_at_start": 1.3, "norm_last_tenth": end, "diverged": end is None or end > 10}
            for end in ends
        ]
        results.append({"method": method, "fell": 3, "points": rows})
    lightsam.draw(results, points, path, "3000 steps of gradient descent on 1000 images")


def draw_bsam(path, noises):
    results = [
        {
            **{"row": row, "noise": noise, "accuracy": some(10, low=90, high=97)},
            **{"nll": some(10, low=0.1), "ece": some(10, low=1, high=40)},
            "bins": [some(15, low=10, high=100), *(sorted(some(15, low=0.1)) for _ in range(2))],
        }
        for row in bsam.ROWS
        for noise in noises
    ]
    bsam.draw(results, noises, path, "Digits: bSAM and its posterior beside SGD and SAM, 10 seeds")


def draw_averages(path, noises):
    results = [
        {"optimizer": name, "rate": rate, "average": average, "noise": noise}
        | {"accuracy": some(20, low=90, high=97)}
        for noise in noises
        for name in averages.OPTIMIZERS
        for rate in averages.RATES
        for average in averages.AVERAGES
    ]
    averages.draw(results, noises, path, "Digits: averaged parameters of SGD and SAM, 20 seeds")


def draw_fine_tune(path, names, measure="accuracy", seeds=10):
    losses = [f"{t}_loss{end}" for t in ("new", "old") for end in fine_tune.DRAWN]
    results = []
    for name in names:
        row = fine_tuning.ROWS[name]
        forgets_nothing = {"low": 0, "high": 0} if row.adapt == "head" else {"low": 0, "high": 0.3}
        values = {loss: some(seeds, low=0.1, high=1.5) for loss in losses}
        values[f"new_{measure}"] = some(seeds)
        values[f"forgotten_{measure}"] = some(seeds, **forgets_nothing)
        differences = {n: {"mean": -0.1, "error": 0.01} for n in values if row.is_radius_tuned}
        named = {"row": name, "adapt": row.adapt, "method": row.method}
        results.append(named | values | {"differences": differences})
    title = "Fine-tuning, scikit-learn's digits: 0 to 4, then 5 to 9; 10 seeds; more, less, lower: "
    fine_tune.draw(results, measure, path, title + "than AdamW, by two standard errors")


def draw_late_sam(path, noises):
    results = [
        {"row": row, "noise": noise, "accuracy": some(20, low=90, high=97)}
        for noise in noises
        for row in late_sam.USES
    ]
    late_sam.draw(results, noises, path, "Digits: SAM on some steps at equal gradients, 20 seeds")


def draw_share_of_sam(path, arms):
    curves = []
    for arm in arms:
        ends = {"base": {"low": 0.5, "high": 0.5}, "sam": {"low": 1, "high": 1}}
        [share] = some(1, **ends.get(arm, {"low": 0.55, "high": 0.95}))
        low, value, high = np.sort(some(3, low=-3, high=0.6))
        point = arm, share_of_sam.method_of(arm), share, Interval(value, low, high)
        curves.append(share_of_sam.Point(*point))
    title = "Digits: SAM gains 1.5 points over its base. 10 of 20 curves keep its accuracy within "
    share_of_sam.draw(curves, path, title + "0.5 somewhere below its gradients (95% intervals)")


def draw_strength(path, arms):
    points = []
    for arm in arms:
        [ratio], [lead] = some(1, low=0.4, high=3), some(1, low=-1.5, high=0.7)
        points.append(strength.Point(arm, strength.method_of(arm), ratio, lead, 0.3))
    title = "Digits, equal epochs: 1 of 14 claims of being better hold, 3 of 9 claims of "
    strength.draw(points, path, title + "being flatter hold")


def draw_overparameterization(path, settings):
    names = ("train_accuracy", "top_eigenvalue", "s2", "linearization")
    results = {
        setting: {
            "rows": {
                row: {
                    "rho": some(low=0.0, high=1.0),
                    "measures": {name: some(16, low=0.1, high=20) for name in names}
                    | {"test_accuracy": some(16, low=0.9 - 1 / setting.width**2)},
                }
                for row in overparameterization.ROWS
            }
        }
        for setting in settings
    }
    title = "Digits: what SAM gains over SGD, by the number of parameters; 16 seeds"
    overparameterization_report.draw(results, path, title)


def draw_second_order(path, seeds):
    best = second_order.Arm("arsam", window=20)
    rows = [
        {
            **{"row": plan.label(), "test": some(seeds, low=93, high=95)},
            **{"share": [0.06 * (index % 7)] * seeds, "length": some(seeds, 10)},
            "ratio": some(seeds, 10, low=0.1, high=30),
        }
        for index, plan in enumerate(second_order.plans(0.3, best))
    ]
    title = "Digits, 30% of the training labels wrong: the second-order part of SAM's gradient"
    second_order.draw(rows, 0.3, path, title)


def draw_stick_figures(path, names):
    joints = np.asarray(some(4, 9, 2, low=0.1))
    rows = [
        {
            **{"row": name, "test": some(20, low=60, high=70)},
            **{"distance": some(20), "shown": np.tile(joints + 0.05 * RNG.random(), (20, 1, 1, 1))},
        }
        for name in names
    ]
    title = "Joints of stick figures; found ones green, missed ones red; 95% intervals"
    stick_figures.draw(rows, {"x": np.asarray(some(4, 256)), "y": joints}, path, title)


def draw_mup(path, parts):
    parser = argparse.ArgumentParser()
    rates, rhos = [0.02, 0.04, 0.08, 0.16, 0.32], [0.05, 0.1, 0.2, 0.4, 0.8]
    args = parser.parse_args([])
    args.__dict__ |= {"parts": parts, "steps": (1, 10), "widths": [256, 512, 1024, 2048]}
    args.__dict__ |= {"seeds": 10, "learning_rates": rates, "rhos": rhos}
    args.__dict__ |= {"transfer_steps": 100, "transfer_seeds": 5}
    report = {
        "exponents": [
            {
                **{"method": method, "steps": steps, "perturbed": "all", "layer": layer},
                **{"exponent": -0.5, "error": 0.01, "effect_by_width": some(4, low=1e-3)},
            }
            for method in mup_transfer.METHODS
            for steps in (1, 10)
            for layer in mup_transfer.LAYERS
        ],
        "grids": [
            {"method": method, "width": width, "loss": some(5, 5, low=0.2), "accuracy": some(5, 5)}
            for width in (mup_transfer.BASE_WIDTH, 1024)
            for method in mup_transfer.METHODS
        ],
    }
    mup_transfer.draw(report, args, path)


def draw_language(path, points, losses, names=()):
    log = Log(points, ["loss", "sharp_loss", *names], ("loss", "held_out_loss"))
    language_model.draw(log, losses, path, "sam, width 128, depth 4, seed 0")


def draw_abstract(path, names, sizes, devices, adapts=("whole",)):
    rows = [
        {
            **{"size": size, "remat": True, "devices": n, "method": name, "adapt": adapt},
            **{"state_bytes": (3 + i % 2) * 4e9 / n, "temporary_bytes": 1e9 * (2 + i)},
            "peak_to_adamw": 1 + i / 9,
        }
        for size in sizes
        for adapt in adapts
        for i, name in enumerate(["adamw", *names])
        for n in devices
    ]
    rows.append(rows[-1] | {"method": "too large", "refused": "at most 2147483647 entries"})
    abstract.draw(rows, path)


def draw_preference(path, names, seeds):
    results = [
        {
            **{"method": name, "time_ratio": sorted(some(3, low=0.95, high=2.2))},
            "accuracy": [100 * x for x in some(seeds, low=0.7, high=0.75)],
        }
        for name in names
    ]
    preference.draw(results, path, f"DPO of a language model with width 64, {seeds} seeds")


class Log:
    def __init__(self, epochs, names, epoch_names=("train_accuracy", "test_accuracy")):
        self.epochs, self.names, self.epoch_names = epochs, names, epoch_names

    def of(self, kind):
        if kind == "epoch":
            pairs = zip(some(self.epochs), some(self.epochs), strict=True)
            rows = [dict(zip(self.epoch_names, pair, strict=True)) for pair in pairs]
        else:
            rows = [dict.fromkeys(self.names, value) for value in some(self.epochs, low=0.1)]
        return [{"step": 10 * (step + 1), **row} for step, row in enumerate(rows)]


def draw_exchange(path, rows):
    rows = [
        {"engine": engine, "workers": workers, "shards": shards, "milliseconds": some(9, low=100)}
        for engine, workers, shards in rows
    ]
    exchange_cost.plot(rows, 25, path)


def draw_faults(path, kinds, problems):
    rows = [
        {"kind": kind, "engine": engine, "seconds": seconds, "problems": problems}
        for kind in kinds
        for engine in faults.ENGINES
        for seconds in some(3, low=1, high=20)
    ]
    faults.plot(rows, path)


def draw_async_cost(path, rows):
    results = [{"row": row, "ratio": [1.5, 1.4, 1.7]} for row in rows]
    async_cost.draw(results, path, "AsyncSAM on cpu and cpu, 64 examples")


def draw_which_batch(path, seeds, epochs):
    points = {
        (arm, each): some(seeds, low=92, high=97)
        for arm, each in itertools.product(which_batch.ARMS, which_batch.EVERY)
    }
    points["against momentum", which_batch.SAME] = some(seeds, low=9, high=11)
    found = {name: some(seeds, epochs, low=0.1, high=0.9) for name in which_batch.COSINES}
    measured = which_batch.Measured([], points, found)
    which_batch.draw(measured, path, "Digits: whose gradient SAM climbs, 20 seeds")


def draw_async_long(path, seeds):
    keys = itertools.product(async_long.ROWS, async_long.LONGER, async_long.HOW)
    points = {key: some(seeds, low=92, high=97) for key in keys}
    async_long.draw(points, 40, path, "Digits, 30% wrong labels: smaller steps, 20 seeds")


def draw_lsam_map(path, seeds):
    values = {name: some(seeds, low=-1, high=3) for name in lsam.CLAIMS}
    spread = {"rate": np.outer(np.square(lsam.RATES), some(seeds)).tolist()}
    lsam.draw(values, spread, path, "LSAM on digits, 10 seeds, 95% intervals")


def draw_data_parallel(path, strategies, epochs):
    loss = np.array(some(10 * epochs, low=0.01))
    results = [
        {
            **{"strategy": name, "loss": (loss + 1e-7 * place).tolist()},
            "test_accuracy_by_epoch": some(epochs),
        }
        for place, name in enumerate(strategies)
    ]
    data_parallel.draw(results, path, "sam on 4 simulated devices in 2 processes")


def draw_parallel_cost(path, devices):
    results = [
        {
            **{"method": name, "devices": n},
            **{kind: {"flops": 1e8 / n, "sent": 1e6 * (n > 1)} for kind in ("formula", "counted")},
        }
        for name in parallel_cost.METHODS
        for n in devices
    ]
    rows = [{"share": 2**i, "lead": lead} for i, lead in enumerate(some(9, low=0.8, high=1.8))]
    parallel_cost.draw(results, rows, path, "dense, 1,234,567 parameters, one batch of 512")


def draw_accelerator(path, scale, names, rows=None):
    """Draw the parts of these names; `rows` are those of a part that times steps."""
    found = {}
    for part in accelerator.all_parts(scale):
        if part.name.partition(" ")[0] not in names:
            continue
        if part.name == "fidelity":
            values = {"highest": 1e-7, "default": 3e-4, "passed": True}
            found[part.name] = [{"row": name, **values} for name in scale.trajectories]
        elif part.name == "memory":
            kinds = ("predicted_bytes", "compiled_bytes", "allocated_bytes")
            found[part.name] = [
                {"row": row, **dict(zip(kinds, some(3, low=2e10, high=4e10), strict=True))}
                for row in scale.held
            ]
        elif part.shown is accelerator_report.STEPS:
            found[part.name] = [
                {"row": row, "ratio": [1.0] * 3 if row == "plain" else sorted(some(3, high=2.2))}
                for row in rows or accelerator.KINDS
            ]
        elif part.shown is accelerator_report.SAMPA:
            sizes = scale.sizes[part.name.removeprefix("SAMPa ")]
            found[part.name] = [
                {"row": row, "batch": size, "ratio": [1.0 + size / 5000] * 3}
                for row in ("plain", "sampa", "sampa-separate")
                for size in sizes
            ]
    accelerator_report.draw(found, path, "samx 0.2.0 on a GPU")


def draw_lean(path, models, variants, versions):
    rows = ["by hand", "sam", "sam, all readings", *[f"sam{when}" for when in versions if when]]
    traffic = [
        {"model": model, "dtype": dtype, "row": row, "bytes": 10.0 + number * (1 + place / 5)}
        for place, model in enumerate(models)
        for dtype in lean.DTYPES
        for number, row in enumerate(rows)
    ]
    peaks = [
        {"row": name + when, "peak": 3 + place / 7 + len(when) / 5}
        for when in versions
        for place, name in enumerate(variants)
    ]
    lean.draw({"bytes": traffic, "peak": peaks}, path)


def of_step_cost(model, batch, names):
    rows = {
        name: {
            **{"time_to_plain": sorted(some(3, low=0.8, high=2.4)), "mean_flops": 1.5},
            "steps_per_second": 100.0,
        }
        for name in names
    }
    return {"model": model, "batch": batch, "parameters": 123_456, "rows": rows}


def draw_step_cost(path, names, models, batches, function=step_cost.plot):
    function([[of_step_cost(m, b, names) for b in batches] for m in models], path)


def draw_lsam(path, rows, seeds, is_marked=False, low=0.85):
    results = []
    for row in rows:
        curve = {"time": [1.0, 200.0, 442.0], "gradients": [32, 1600, 3200]}
        curve |= {"test_accuracy": some(3, seeds, low=low)}
        results.append({"row": row, "test_accuracy": curve["test_accuracy"][-1], "curve": curve})
    title = (
        "LSAM on digits, 30% of the training labels wrong, 8 workers, 10 seeds, the last 4 times"
    )
    lsam_digits.draw(results, path, f"{title} slower", "gradients of a fast worker", is_marked)


def draw_edge(path, arguments, steps):
    args = edge_of_stability.parse(arguments.split())
    args.steps = 100 * (steps - 1)
    results = []
    for name, case in edge_of_stability.cases_of(args).items():
        count = 1 if name == "usam-large" else steps
        run = {"step": [100 * step for step in range(count)], "eigenvalue": some(count, high=20)}
        run["edge"] = some(count, low=5, high=9) if case.loss_name == "squared" else some(count)
        run["edge"][-1] = run["eigenvalue"][-1]
        results.append(edge_of_stability.summarize(name, case, run, args))
    edge_of_stability.draw(results, path, edge_of_stability.CAPTION)


def draw_sharpness(path, names, arguments=""):
    args = sharpness.parse(arguments.split())
    numbers = ("value", "fifth", "share", "agree", "stationarity", "test_accuracy", "test", "train")
    numbers += ("train_accuracy", "grad_norm")
    curves = {
        "density": lambda scale: {
            "grid": np.linspace(-0.2, 1.1, 50),
            "density": np.geomspace(10, 1e-9, 50) * scale,
        },
        "slice": lambda scale: {"losses": 1 + scale * sharpness_measures.ALPHAS**2},
        "plane": lambda scale: {
            "losses": 1 + np.add.outer(*[scale * sharpness_measures.ALPHAS**2] * 2)
        },
    }
    checkpoints = []
    for place, name in enumerate(names):
        measured = {}
        for program in ("basics", *sharpness_measures.programs_of(args)):
            scale = some(low=0.1 if place else 0.9, high=3 if place else 1.1)
            measured[program] = dict.fromkeys(numbers, scale) | {"error": 0.1 * scale}
            measured[program] |= curves[program](scale) if program in curves else {}
        measured["basics"] |= {"test_accuracy": some(), "test_accuracy_error": 0.01}
        checkpoints.append({"name": name, "measured": measured})
    rows = [r for r in sharpness_measures.rows_of(args) if r.program in checkpoints[0]["measured"]]
    pairs = [
        {"names": [*pair], "losses": some(21)}
        for pair in itertools.combinations(names, 2)
        if "barrier" in args.measures
    ]
    title = sharpness.title_of(checkpoints, rows)
    assert not sharpness_figure.is_empty(checkpoints, pairs, rows)
    caption = sharpness.CAPTION.format(
        size="8,970", images="1,000", labels="30% of the training labels wrong", gradients=800
    )
    sharpness_figure.draw(checkpoints, pairs, rows, path, title, caption)


def draw_sharpness_cost(path, names):
    results = [
        {
            **{"row": name, "title": row.title, "gradients": some(low=0.3, high=80)},
            **{"ratio": sorted(some(3, low=1, high=80)), "peak": some(low=1, high=30)},
        }
        for name, row in sharpness_cost.rows_of(512).items()
        if name in names
    ]
    results[-1] |= {"gradients": None, "failed": "too large"}
    caption = sharpness_cost.CAPTION.format(small=50_826, large=9.9, layers=6, examples=512)
    sharpness_cost.draw(results, path, caption)


STEPS = [*("gradient", "plain", "sam by hand", "sam, readings unread", "optax.contrib.sam")]
EVERY = [name for name in VARIANTS if name != "base"]
CASES = {
    "digits.draw": [
        lambda path: draw_digits(path, [*digits.ROWS]),
        lambda path: draw_digits(path, ["base2x", "sam"], seeds=1),
        lambda path: draw_digits(path, ["looksam"], noises=(0.0,)),
        lambda path: draw_digits(path, [*digits.DEFAULT], monitored=4),
        lambda path: draw_digits(path, ["base", "sam"], noises=(0.0,), seeds=1, monitored=1),
    ],
    "front_figure.draw": [
        lambda path: draw_front(path, [*digits.ROWS], 3),
        lambda path: draw_front(path, ["base", "base2x", "sam"], 1),
    ],
    "comparison_figures.draw_comparison": [
        lambda path: draw_comparison(path, fake_tasks(["digits-noisy"], [*digits.ROWS], 3)),
        lambda path: draw_comparison(
            path,
            fake_tasks(["digits-noisy", "digits-clean"], [*digits.ROWS], 3),
            fake_tasks("abcdef", [*digits.ROWS][:14], main="loss", tier=2),
        ),
        lambda path: draw_comparison(path, fake_tasks(["one"], ROWS, 1)),
        lambda path: draw_comparison(path, fake_tasks(["one"], ["base", "base2x"])),
    ],
    "comparison_figures.draw_ranking": [
        lambda path: draw_ranking(path, fake_tasks(), fake_tasks(["three"], ROWS[:4], tier=2)),
        lambda path: draw_ranking(path, fake_tasks(rows=[*digits.ROWS])),
        lambda path: draw_ranking(path, fake_tasks(["one"], ["base"], 1)),
    ],
    "sharpness_and_accuracy.draw": [
        lambda path: draw_sharpness_and_accuracy(path, fake_tasks(["digits-noisy", "mnist1d"])),
        lambda path: draw_sharpness_and_accuracy(path, fake_tasks(["one"], ROWS, 1)),
        lambda path: draw_sharpness_and_accuracy(
            path, fake_tasks([f"a task with number {number}" for number in range(14)])
        ),
    ],
    "long_tail.draw": [
        lambda path: draw_long_tail(path, [*long_tail.METHODS], 100.0, 3),
        lambda path: draw_long_tail(path, ["sam"], 1.0, 1),
        lambda path: draw_long_tail(path, ["base", "sam"], 10.0, 1),
    ],
    "lets.draw": [
        lambda path: draw_lets(path, [0.3, 0.0], 3),
        lambda path: draw_lets(path, [0.3], 1),
    ],
    "normalization.draw": [
        lambda path: draw_normalization(path, [*normalization.ARMS], 20),
        lambda path: draw_normalization(path, ["sgd", "sam"], 1),
    ],
    "convergence.draw": [
        lambda path, parts=parts: draw_convergence(path, parts)
        for parts in (["parallel", "lightsam", "saddle"], ["lightsam"])
    ],
    "lightsam.draw": [
        lambda path, points=points: draw_lightsam(path, points) for points in (2, 5, 9)
    ],
    "bsam.draw": [
        lambda path: draw_bsam(path, [0.3, 0.0]),
        lambda path: draw_bsam(path, [0.0]),
    ],
    "averages.draw": [
        lambda path: draw_averages(path, [0.3, 0.0]),
        lambda path: draw_averages(path, [0.0]),
    ],
    "fine_tune.draw": [
        lambda path: draw_fine_tune(path, [*fine_tuning.ROWS]),
        lambda path: draw_fine_tune(path, ["lora adamw", "lora sam", "lora bi-lora"], "loss", 3),
        lambda path: draw_fine_tune(path, ["head adamw"], seeds=1),
        lambda path: draw_fine_tune(path, ["whole adamw", "whole sam", "head adamw"], "loss", 1),
    ],
    "committed.draw": [
        lambda path: committed.draw(committed.committed(), path),
        lambda path: committed.draw(committed.committed()[:3], path),
    ],
    "snippets.draw": [
        lambda path, count=count: snippets.draw(
            {row: {"measures": {"test_accuracy": some(20)}} for row in list(snippets.ROWS)[:count]},
            path,
        )
        for count in (1, 5)
    ],
    "two_views.draw": [
        lambda path, methods=methods: two_views.draw(
            [
                {
                    "method": method,
                    "over_rho": some(1 + 10 * (method != "sgd"), 3, low=5, high=12),
                }
                for method in methods
            ],
            path,
        )
        for methods in (["sgd", "sam"], list(two_views.METHODS))
    ],
    "wrong_labels.draw": [
        lambda path, noises=noises: wrong_labels.draw(
            [
                {"row": row, "noise": noise, "test_accuracy": some(20)}
                for noise in noises
                for row in ("sgd", "sam", *(f"{n} steps" for n in wrong_labels.ASCENT_STEPS))
            ],
            path,
        )
        for noises in ([wrong_labels.SWEEP], wrong_labels.NOISES)
    ],
    "exact.draw": [
        lambda path: exact.draw(claim.committed("exact", exact.CLAIMS), path),
        lambda path: exact.draw(claim.committed("exact", exact.CLAIMS)[:1], path),
    ],
    "late_sam.draw": [
        lambda path: draw_late_sam(path, [0.3, 0.0]),
        lambda path: draw_late_sam(path, [0.0]),
    ],
    "overparameterization_report.draw": [
        lambda path: draw_overparameterization(path, overparameterization.all_settings()),
        lambda path: draw_overparameterization(path, overparameterization.all_settings()[:2]),
    ],
    "second_order.draw": [
        lambda path: draw_second_order(path, 20),
        lambda path: draw_second_order(path, 1),
    ],
    "stick_figures.draw": [
        lambda path: draw_stick_figures(path, [*stick_figures.ARMS]),
        lambda path: draw_stick_figures(path, ["base", "sam"]),
    ],
    "share_of_sam.draw": [
        lambda path: draw_share_of_sam(path, [*share_of_sam.arms_of(400)]),
        lambda path: draw_share_of_sam(path, ["base", "sam", "rst 0.5"]),
    ],
    "strength.draw": [
        lambda path: draw_strength(
            path, [arm for arm in strength.arms_of() if not arm.endswith(strength.AS_SAM)]
        ),
        lambda path: draw_strength(path, ["sam", "gsam 0.4"]),
    ],
    "mup_transfer.draw": [
        lambda path: draw_mup(path, ["exponents", "transfer"]),
        lambda path: draw_mup(path, ["exponents"]),
        lambda path: draw_mup(path, ["transfer"]),
    ],
    "cifar.draw": [
        lambda path: cifar.draw(Log(9, ["loss", "sharp_loss"]), path, "resnet, sam, seed 0"),
        lambda path: cifar.draw(Log(1, ["loss"]), path, "vit, base, seed 0"),
        lambda path: cifar.draw(Log(9, ["loss", *monitoring.NAMES]), path, "vit, base, seed 0"),
    ],
    "language_model.draw": [
        lambda path: draw_language(path, 9, {"trigram_loss": 0.96, "held_out_loss": 0.9}),
        lambda path: draw_language(path, 1, {"trigram_loss": 0.9, "held_out_loss": 0.97}),
        lambda path: draw_language(
            path, 1, {"trigram_loss": 0.9, "held_out_loss": 0.97}, monitoring.NAMES
        ),
    ],
    "abstract.draw": [
        lambda path: draw_abstract(path, EVERY, ("100M", "1B", "7B"), [1, 8, 64]),
        lambda path: draw_abstract(path, ["sam"], ("7B",), [1]),
        lambda path: draw_abstract(path, ["sam"], ("1B",), [1, 8], language_model.ADAPT),
    ],
    "preference.draw": [
        lambda path: draw_preference(path, [*preference.METHODS], 5),
        lambda path: draw_preference(path, ["adamw", "logits-sam"], 1),
    ],
    "exchange_cost.plot": [
        lambda path: draw_exchange(path, [("ray", w, s) for w in (1, 4, 8) for s in (1, 2, 4)]),
        lambda path: draw_exchange(path, [("threads", 2, 1)]),
    ],
    "faults.plot": [
        lambda path: draw_faults(path, faults.KINDS, ["thread worker 1 is left"]),
        lambda path: draw_faults(path, ["hangs"], []),
    ],
    "async_cost.draw": [
        lambda path: draw_async_cost(path, ["sgd", "sam", "async-sam, b", "async-sam, b/4"]),
        lambda path: draw_async_cost(path, ["sgd"]),
    ],
    "which_batch.draw": [
        lambda path: draw_which_batch(path, 5, 40),
        lambda path: draw_which_batch(path, 1, 1),
    ],
    "async_long.draw": [lambda path: draw_async_long(path, 5)],
    "lsam.draw": [lambda path: draw_lsam_map(path, 5), lambda path: draw_lsam_map(path, 1)],
    "data_parallel.draw": [
        lambda path: draw_data_parallel(path, [*data_parallel.STRATEGIES], 5),
        lambda path: draw_data_parallel(path, ["jit"], 1),
    ],
    "parallel_cost.draw": [
        lambda path: draw_parallel_cost(path, [1, 2, 4, 8]),
        lambda path: draw_parallel_cost(path, [1]),
    ],
    "accelerator_report.draw": [
        lambda path: draw_accelerator(
            path,
            accelerator.FULL,
            ["fidelity", "memory", "dense", "language", "ResNet-18", "ViT", "wide", "SAMPa"],
        ),
        lambda path: draw_accelerator(path, accelerator.SMOKE, ["fidelity"]),
        lambda path: draw_accelerator(path, accelerator.SMOKE, ["ViT", "SAMPa"], ["plain", "sam"]),
        lambda path: draw_accelerator(path, accelerator.SMOKE, ["memory", "ViT"], ["plain"]),
    ],
    "step_cost.plot": [
        lambda path: draw_step_cost(path, STEPS + EVERY, ["mlp", "conv"], [64]),
        lambda path: draw_step_cost(path, ["plain", "sam"], ["mlp"], [64, 128]),
    ],
    "step_cost.plot_sizes": [
        lambda path, names=names, models=models: draw_step_cost(
            path, names, models, [32, 64, 128], step_cost.plot_sizes
        )
        for names, models in (
            ([*step_cost.BY_SIZE], ["mlp", "conv", "transformer"]),
            (["plain"], ["mlp"]),
        )
    ],
    "lean.draw": [
        lambda path: draw_lean(path, lean.MODELS, lean.VARIANTS, ["", " before"]),
        lambda path: draw_lean(path, lean.MODELS[:1], ["sam"], [""]),
        lambda path: draw_lean(path, [], lean.VARIANTS, [""]),
    ],
    "edge_of_stability.draw": [
        lambda path: draw_edge(path, "", 31),
        lambda path: draw_edge(path, "--cases gd", 2),
        lambda path: draw_edge(path, "--cases usam usam-large", 5),
        lambda path: draw_edge(path, "--cases sam cross-entropy --loss cross_entropy", 5),
    ],
    "sharpness_figure.draw": [
        lambda path: draw_sharpness(path, ["base", "sam", "asam", "msam"]),
        lambda path: draw_sharpness(
            path, [*VARIANTS], "--measures eigenvalues density m-sharpness slice plane barrier"
        ),
        lambda path: draw_sharpness(path, ["base", "sam"], "--measures trace"),
        lambda path: draw_sharpness(path, ["a long name of a run"], "--measures slice"),
        lambda path: draw_sharpness(path, ["base", "sam", "asam"], "--measures plane barrier"),
        lambda path: draw_sharpness(path, ["one run"], "--measures plane"),
        lambda path: draw_sharpness(path, ["sam", "asam"], "--measures density slice m-sharpness"),
    ],
    "sharpness_cost.draw": [
        lambda path: draw_sharpness_cost(path, sharpness_cost.ROWS),
        lambda path: draw_sharpness_cost(path, sharpness_cost.ALWAYS),
    ],
    "gradient_directions.draw": [
        lambda path: draw_directions(path, 3, 2),
        lambda path: draw_directions(path, 1, 1),
    ],
    "lsam_digits.draw": [
        lambda path: draw_lsam(path, [*lsam_digits.ROWS], 3),
        lambda path: draw_lsam(path, ["lsam", "dp-sam, same time"], 1, is_marked=True),
        lambda path: draw_lsam(path, [*lsam_digits.ROWS], 2, low=0.1),
    ],
}
MOST = 1  # figures of a function in the default run: one with all that is usual in it
ALL = [
    pytest.param(case, id=f"{name}-{number}", marks=[pytest.mark.slow] if number >= MOST else [])
    for name, cases in CASES.items()
    for number, case in enumerate(cases)
]


def functions_that_draw():
    for path in EXAMPLES.rglob("*.py"):
        if "figures.save(" not in (text := path.read_text()):  # before parsing, which takes longer
            continue
        lines = text.splitlines()
        for node in ast.parse(text).body:
            function = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.FunctionDef) and "figures.save(" in function:
                yield f"{path.stem}.{node.name}"


def test_every_function_that_draws_is_here():
    assert sorted(functions_that_draw()) == sorted(CASES)


@pytest.fixture
def problems(monkeypatch):
    """Return what is wrong with the figures that are saved; nothing is rendered to a file.

    The numbers of a figure do not depend on the tests that ran before.
    """
    RNG.bit_generator.state = START
    found = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **keywords: found.append(drawn.problems_of(figure))
    )
    return found


@pytest.mark.parametrize("draw", ALL)
def test_all_text_is_readable(draw, tmp_path, problems):
    draw(tmp_path / "plot.png")
    assert problems == [[]]


def two_panels():
    figure = figures.make_figure(2)
    return figure, figure.subplots(1, 2)


def test_the_check_sees_what_is_wrong():
    figure, (left, right) = two_panels()
    left.text(0.2, 0.5, "one")
    assert drawn.problems_of(figure) == []
    left.text(0.2, 0.51, "other")
    left.text(0.9, 0.2, "a text that is much too long for its panel").set_in_layout(False)
    figure.text(0.99, 0.5, "cut")
    text = "\n".join(drawn.problems_of(figure))
    for wanted in (
        "'one' over 'other'",
        "too long for its panel' in another panel",
        "'cut' outside",
    ):
        assert wanted in text
    assert right.get_title() == ""


def test_labels_of_ends_are_moved_apart_and_stay_near(tmp_path):
    figure, (left, _) = two_panels()
    for level in (0.1, 0.5, 0.501, 0.502, 0.9):
        left.plot([0, 1], [level, level], label=f"at {level}")
    left.plot([0, 0.5], [0.3, 0.3], label="short")
    left.set_ylim(0, 1)
    left.plot([0, 1], [0.2, -50], label="below")
    figures.label_ends(left)
    figures.save(figure, tmp_path / "plot.png")
    boxes = {text.get_text(): text.get_window_extent() for text in left.texts}
    for a, b in itertools.combinations(boxes.values(), 2):
        assert drawn.overlap(a, b) < 1
    for level in (0.1, 0.9):  # alone: at the height of its line
        box, (_, pixel) = boxes[f"at {level}"], left.transData.transform((1, level))
        assert abs((box.y0 + box.y1) / 2 - pixel) < 2
    middle = boxes["at 0.501"]
    assert abs((middle.y0 + middle.y1) / 2 - left.transData.transform((1, 0.501))[1]) < 2
    assert boxes["short"].x1 < left.get_window_extent().x1
    assert boxes["below"].y0 == pytest.approx(left.get_window_extent().y0, abs=2)
    assert left.get_window_extent().height > 0.5 * figure.bbox.height


def test_heights_follow_one_rule():
    assert figures.height_of(2) - figures.height_of(1) == pytest.approx(figures.ROW)
    figure = figures.make_figure(1, [figures.height_of(36), figures.height_of()])
    assert figure.get_figheight() > 36 * figures.ROW
