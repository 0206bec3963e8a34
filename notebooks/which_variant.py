# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which variant?
#
# samx has 54 variants of sharpness-aware minimization. You need one. After this page
# you can
#
# - choose a variant by what you can spend and by what your data look like,
# - see what each variant gained on one task where all were tuned alike, and what it cost,
# - compare two variants on your own task so that the comparison is fair.
#
# It runs in about a minute on two CPU cores.
#
# ## In short
#
# 1. **One pass over a very large data set, or clean and easy data?** None. Keep the base optimizer.
# 2. **Can you pay for two gradients per step?** `samx.sam`, the reference. Below, no variant of the
#    same price is clearly better: the largest leads over it, 0.30 ± 0.12 points of `bsam`, 0.28 ± 0.15
#    of `le_sam` and 0.24 ± 0.09 of `msam`, may be luck. Tune ρ and the learning rate first; that
#    matters more than the variant.
# 3. **Only one gradient?** `samx.momentum_sam`. It is the best of all below. In its authors' tables
#    ([CIFAR-100](https://arxiv.org/abs/2401.12033)) it lies between the base optimizer and SAM.
# 4. **About 20% more gradients** (23 to 30% more time with large batches, more with small ones:
#    [measured](costs.md#sharp-gradients-on-some-steps))**?** SAM on every fifth step:
#    `samx.perturb_if(samx.policies.every(5), samx.sam(rho))`. `samx.looksam` reuses a part of the
#    sharp gradient in between. It is behind in our [comparison](comparison.md).
# 5. **Idle devices?** `samx.sampa` computes both gradients at the same time. `samx.async_sam` uses
#    a second, even a slower, device.
# 6. **Little memory?** SAM needs one temporary copy of the parameters and keeps nothing between
#    steps. `samx.sl_sam` computes the gradients of some layers only; it learned much less below.
# 7. **Wrong labels?** Every sharp variant helps, except those that look for the examples with the
#    largest losses: `samx.ksam` finds the wrong labels.
# 8. **Rare classes?** `samx.imbalanced_sam` or `samx.focal_sam`.
#
# ## By situation
#
# | your situation | variant | starting ρ | gradients |
# |---|---|---|---|
# | first try; wrong labels; little data; fine-tuning | `sam` | 0.05, then 0.1, 0.2, 0.5 | 2 |
# | weights of very different sizes | `asam` | 0.5; 1 or 2 for more classes | 2 |
# | idle parallel devices | `sampa` | 0.1, with `lam=0.2` | 2 at once |
# | a second device, even a slow one | `async_sam` | as SAM | 2, in the time of 1 |
# | no time for a second gradient | `momentum_sam` | 0.3 to 1; ResNets 3 | 1 |
# | no second gradient, no momentum in the base | `lpf_sgd`: noise on the weights | its σ: 0.002; small networks 0.02 to 0.2 | 1 |
# | a little more time, not twice | `perturb_if(policies.every(5), ...)` | as SAM | 1.2 |
# | SAM only late in training | `perturb_if(policies.between(start), ...)` | as SAM | 1, then 2 |
# | rarely early, always late | `perturb_if(policies.join_policies(...), ...)` | as SAM | 1.2, then 2 |
# | losses per example, half of each batch | `ausam` | 0.1 | 1 |
# | losses per example, labels can be trusted | `ksam` | 0.1 | 1.33 |
# | several devices | `data_parallel(..., ascent="local")` | as SAM | 2 |
# | microbatches on one device | `msam` | as SAM | 2 |
# | one network in many widths | `mup_sam`, µP learning rates | that of the narrow one | 2 |
# | no time to tune | `lightsam_norm`: robust; on the digits no better than the base | 0.05 to 1, rate 1 | 2 |
# | gradients that do not fit into memory | `sl_sam` | 0.05 | below 1.5 |
# | no second gradient; the logits of all examples fit into memory | `saf` | its λ: 0.3 | 1 |
# | no learning rate to tune, a loss that can reach 0 | `sam_polyak` | 0.1 | 2 |
# | a better network to evaluate, after any training | `averages.ema` around it | | none |
# | calibrated probabilities | `bsam`, with `samx.posterior` | 0.01, rate 0.5 | 2 |
# | Muon as the base, the same geometry for the ascent | `spectral_sam` | below SAM's | 2 |
# | a random baseline for SAM | `lpf_sgd(noise=sphere_noise(rho))` | SAM's | 1 |
# | perturb the normalization layers only | `sam_on` | 5 to 10 × SAM's | 2 |
# | perturb other layers only | `perturbations.on_leaves` | 5 to 10 × SAM's | 2 |
# | rare classes | `focal_sam`; `imbalanced_sam` | 0.1 to 0.5 | 2.67 |
# | no idea of ρ, held-out data to spare | `lets`: an experiment | 0.05 | 6; 4 |
# | asynchronous training | `elastic.train` with SAM in each; `lsam` | 0.05 | 2 per worker |
# | one pass over a very large data set | none: the base optimizer | | 1 |
#
# Each row of [the methods page](methods.md) says more. Starting values of ρ for ResNets, vision
# transformers and others are in [How to choose rho](choosing_rho.ipynb).

# %%
import json
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import samx
from examples.common import figures
from examples.common.digits_task import initialize, rows_of, shuffled, split
from examples.common.registry import VARIANTS
from examples.common.training import make_trainer, train
from examples.common.tuning import Runs, runs_of
from examples.digits import BASELINES, ROWS, better_baseline, color_of, lead_of

figures.use_style()
RESULTS = Path(samx.__file__).parents[1] / "examples/compare/results/digits.json"
NOISE, SEEDS, EPOCHS = 0.3, 10, 40
TIMED_WIDTH, ROUNDS = 512, 9

# %% [markdown]
# ## The evidence
#
# `python examples/digits.py` trains a small network on scikit-learn's digits, with 30% wrong labels
# and with clean ones. Every variant gets the same treatment:
#
# - learning rate and ρ are chosen together on validation images, with seeds that are not
#   reported, by a search that goes on until the best pair has worse neighbours on all sides;
# - then it trains with the chosen values and new seeds, and the test images are used once;
# - every variant takes the same number of steps. `base2x` is SGD with momentum and twice as many
#   steps, so it spends as many gradients as SAM.
#
# The results are committed, so nothing is trained in this part. Differences are **paired**: equal
# seeds have equal images, wrong labels, initial weights and batches. They are taken from the
# *better* of the two baselines, so that no variant wins against a weak rival.

# %%
results = json.loads(RESULTS.read_text())["rows"]
noisy, clean = ([r for r in results if r["noise"] == noise] for noise in (NOISE, 0.0))
rows = {result["row"]: result for result in noisy}
rival = better_baseline(noisy)
leads = {row: lead_of(noisy, row, rival) for row in rows}  # mean and standard error, in points


def relative(costs):
    """Divide the cost of each row by that of the base optimizer."""
    return {row: cost / costs["base"] for row, cost in costs.items()}


gradients = relative({row: rows[row]["gradients"] for row in rows})
print(f"{len(rows)} rows, {len(rows['sam']['test_accuracy'])} seeds; the better base is {rival}")

# %%
head = f"{'':<20}{'accuracy':>9}{'minus ' + rival:>16}{'gradients':>11}"
print(f"{head}{'rate':>8}{'rho':>7}")
for row in sorted(rows, key=lambda row: -leads[row][0]):
    result, (mean, error) = rows[row], leads[row]
    print(
        f"{row:<20}{100 * np.mean(result['test_accuracy']):9.2f}{mean:+9.2f} ± {error:.2f}"
        f"{gradients[row]:11.2f}{result['learning_rate']:8g}{result['rho']:7g}"
    )

# %% [markdown]
# Time is measured here and now, on your machine, for the rows that get a name in the figure. The
# network of the table is so small that its time is mostly overhead, so this one is wider. Each
# round takes ten steps of every row and divides by the time of the base in the *same* round. The
# median over the rounds counts.

# %%
SHOWN = [*BASELINES, "sam", "asam", "sampa", "momentum-sam", "looksam", "periodic", "ausam"]
SHOWN += ["esam", "gsam", "ksam"]
shown = [row for row in SHOWN if row in rows]


def stepper(row):
    """Return a function that takes ten steps of a row and returns its seconds."""
    trainer = make_trainer(VARIANTS[ROWS[row][0]], "momentum", TIMED_WIDTH, EPOCHS)
    runs = Runs(*runs_of([0], [(rows[row]["learning_rate"], rows[row]["rho"])]))
    params, data = initialize(runs.seed, TIMED_WIDTH), split(runs.seed, NOISE)
    params, run, images = jax.tree.map(lambda leaf: leaf[0], (params, runs, data[0]))
    carry = params, trainer.init(run, params)
    batches = [rows_of(images, where) for where in shuffled(0, 0)]

    def ten_steps():
        nonlocal carry
        start = time.perf_counter()
        for batch in batches:
            carry = trainer.step(*carry, run, batch)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    ten_steps()  # compiles
    return ten_steps


timed = [row for row in shown if row != "base2x"]  # whose steps are the base's
steppers = {row: stepper(row) for row in timed}
rounds = [{row: ten_steps() for row, ten_steps in steppers.items()} for _ in range(ROUNDS)]
times = {row: np.median([seconds[row] / seconds["base"] for seconds in rounds]) for row in timed}
times["base2x"] = 2 * times["base"]

# %%
figure, axes = plt.subplots(1, 2, figsize=(13.5, 5.4), sharey=True)
for axis, cost in zip(axes, (gradients, times), strict=True):
    axis.set_xlim(0.7, 1.15 * max(cost.values()))
    axis.plot(axis.get_xlim(), (0, 0), color=figures.GREY, linewidth=1, zorder=0)
    for row in cost:
        mean, error = leads[row]
        if row in shown:
            style = dict(fmt="o", linewidth=1, color=color_of(row))
            axis.errorbar(cost[row], mean, yerr=error, **style)
        else:
            axis.plot(cost[row], mean, "o", color=figures.GREY, alpha=0.5, markersize=4, zorder=0)
    figures.label_points(axis, [(cost[r], leads[r][0], r, color_of(r)) for r in shown])
axes[0].set(xlabel="gradients, relative to the base")
axes[0].set_ylabel(f"test accuracy minus {rival}, points")
axes[1].set(xlabel="time, relative to the base")
cheap = max((row for row in rows if gradients[row] < 1.3), key=lambda row: leads[row])
figure.suptitle(
    f"{cheap} gains {leads[cheap][0]:+.1f} ± {leads[cheap][1]:.1f} points "
    f"for {gradients[cheap]:.1f} times the base's gradients, "
    f"sam {leads['sam'][0]:+.1f} ± {leads['sam'][1]:.1f} for {gradients['sam']:.1f} times",
    x=0.01,
    ha="left",
)
plt.show()

# %% [markdown]
# Red: the base optimizer, with as many steps as the others and with twice as many. Grey: variants
# without a name here. Bars are one standard error over the seeds.
#
# How to read it honestly:
#
# - **Sixty variants were compared.** The best of sixty is partly the luckiest.
# - **The errors do not contain the luck of the search.** Where two pairs of learning rate and ρ are
#   equally good on validation images, chance decides. The last section shows how much that is.
# - **Time depends on the machine and the model.** With these small batches the work on the weights
#   counts too: norms, perturbations, averages. `sampa` is faster where both gradients run side by
#   side. For other models see [what it costs](costs.md).
# - **Wrong labels are the best case** of sharpness-aware training. The last column of the next
#   table has the same variants with clean labels.

# %%
rivals = [row for row in rows if gradients[row] > 1.7 and row not in ("sam", *BASELINES)]
against_sam = {row: lead_of(noisy, row, "sam") for row in rivals}
ahead = [row for row, (mean, error) in against_sam.items() if mean > 2 * error]
behind = [row for row, (mean, error) in against_sam.items() if mean < -2 * error]
print(f"{len(rivals)} variants spend about two gradients on every step, as sam does.")
print(f"Ahead of sam by more than two standard errors: {', '.join(ahead) or 'none'}.")
print(f"Behind it by as much: {', '.join(behind) or 'none'}.")

clean_rival = better_baseline(clean)
print(f"\n{'':<16}{'wrong labels, minus ' + rival:>28}{'clean, minus ' + clean_rival:>24}")
for row in shown:
    (mean, error), (clean_mean, clean_error) = leads[row], lead_of(clean, row, clean_rival)
    print(f"{row:<16}{mean:+20.2f} ± {error:.2f}{clean_mean:+18.2f} ± {clean_error:.2f}")

# %% [markdown]
# ## Compare variants yourself
#
# The same comparison, run now: some rows at their chosen learning rates and ρ, ten seeds, all seeds
# at once under `vmap`. `ROWS` and `VARIANTS` are the tables of
# [`examples/digits.py`](../examples/digits.py); a row of your own is one line. The last row is SAM
# once more, at the neighbouring learning rate; on validation images both are about equally good.


# %%
def run_row(row, **other):
    """Train a row at its chosen values; return the test accuracy of each seed, and its cost."""
    variant, factor = ROWS[row]
    epochs, chosen = factor * EPOCHS, rows[row] | other
    trainer = make_trainer(VARIANTS[variant], "momentum", 64, epochs)
    runs = Runs(*runs_of(range(SEEDS), [(chosen["learning_rate"], chosen["rho"])]))
    images, _, test = split(runs.seed, NOISE)
    params = initialize(runs.seed, 64)
    trained = train(trainer, params, runs, images, epochs, advance=lambda _: None, watched=test)
    return trained.accuracies[-1], trained.gradients[-1].mean()


live = {row: run_row(row) for row in (rival, "momentum-sam", "looksam", "sam")}
neighbour = 0.05 if rows["sam"]["learning_rate"] > 0.05 else 0.1
live[f"sam, rate {neighbour}"] = run_row("sam", learning_rate=neighbour)

# %%
print(f"{SEEDS} seeds{'accuracy':>17}{'minus ' + rival:>18}{'gradients':>11}")
for row, (accuracies, spent) in live.items():
    paired = 100 * (accuracies - live[rival][0])
    error = paired.std(ddof=1) / np.sqrt(SEEDS)
    mean = f"{100 * accuracies.mean():9.2f}{paired.mean():+11.2f}"
    print(f"{row:<16}{mean} ± {error:.2f}{spent:11.0f}")
apart = [
    100 * np.abs(accuracies - rows[row]["test_accuracy"][:SEEDS]).max()
    for row, (accuracies, _) in live.items()
    if row in rows
]
print(f"largest difference of one seed from the committed results: {max(apart):.1f} points")

# %% [markdown]
# Compare both rows of SAM. That much is chance in the search, and a difference between variants
# that is no larger means nothing. (On another machine single images may be classified otherwise,
# hence the last line.)
#
# For a fair comparison on your own task, keep four rules:
#
# 1. **Equal cost.** Give the base optimizer twice the steps, or the same time, and report the
#    better of both baselines.
# 2. **Equal tuning.** Choose learning rate and ρ for each method, on validation data, on grids
#    whose best value lies inside: [How to choose rho](choosing_rho.ipynb).
# 3. **Paired seeds.** Subtract seed by seed. What all methods share, an easy or a hard split, then
#    drops out of the error.
# 4. **New seeds for the report.** Seeds that chose a value do not report it.
#
# ## Where to go next
#
# - [How to choose rho](choosing_rho.ipynb): the number that matters more than the variant.
# - [Methods](methods.md): one card per variant, with formula, cost and what to watch.
# - [The papers' claims](claims.md): what each method promised, and what we see.
# - [Eight devices](eight_devices.ipynb): `sampa` on two groups, perturbations of single devices.
# - [Write your own variant](write_your_variant.ipynb), and see its dot among these.
