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
# # How to choose rho
#
# The radius ρ is the one new number that SAM brings. After this page you can
#
# - sweep ρ, learning rate and seeds in **one compiled program**,
# - read the resulting map, and see whether your grid was wide enough,
# - choose a starting value for your architecture and optimizer,
# - let ρ follow a schedule, and check in the metrics of a run that SAM does something.
#
# It runs in about a minute on two CPU cores.
#
# **The short answer.** Try ρ = 0.05, 0.1, 0.2 and 0.5 for SAM; 0.5, 1 and 2 for ASAM. Try each with
# your learning rate *and with one that is two to three times larger*. If the best value lies at the
# edge of the grid, move the grid. [Starting values](#starting-values) for ResNets, vision
# transformers with AdamW and others are in the table below.

# %%
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import samx
from examples.common import figures
from examples.common.digits_task import (
    BATCH,
    STEPS_PER_EPOCH,
    Network,
    initialize,
    rows_of,
    shuffled,
    split,
)
from examples.common.tuning import TUNING_SEEDS

figures.use_style()
EPOCHS, WIDTH, TEST_SEEDS = 40, 64, 10
RATES = {"SGD": (0.02, 0.05, 0.1, 0.2, 0.5), "AdamW": (1e-3, 2e-3, 5e-3, 0.01, 0.02)}
RADII = {"SAM": (0, 0.1, 0.2, 0.4, 0.8), "ASAM": (0, 0.25, 0.5, 1, 2)}

# %% [markdown]
# ## The task
#
# A network with two hidden layers learns scikit-learn's 8×8 digits from 1000 images, 30% of which
# carry a wrong label. Each seed has its own split, wrong labels, initial weights and batches. Four
# seeds are for choosing. They are never used to report a result. The task comes from
# [`examples/common/digits_task.py`](../examples/common/digits_task.py).

# %%
tuning = jnp.array(TUNING_SEEDS)
graph = nnx.graphdef(Network(WIDTH, rngs=nnx.Rngs(0)))
bases = {"SGD": lambda rate: optax.sgd(rate, momentum=0.9), "AdamW": optax.adamw}
variants = {"SAM": samx.sam, "ASAM": samx.asam}


def logits(params, x):
    return nnx.merge(graph, params)(x)


def accuracy(params, data):
    return (logits(params, data["x"]).argmax(-1) == data["y"]).mean()


def train(tx, seed, params, images):
    """Train one network; return its parameters and the readings of every step."""

    def step(carry, rows):
        params, state = carry
        batch = rows_of(images, rows)

        def value_fn(params):
            scores = logits(params, batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()

        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "readings")

    rows = jax.vmap(lambda epoch: shuffled(seed, epoch))(jnp.arange(EPOCHS)).reshape(-1, BATCH)
    (params, _), readings = jax.lax.scan(step, (params, tx.init(params)), rows)
    return params, readings


# %% [markdown]
# ## One program for the whole grid
#
# `rho` may be a Python number, a schedule, or a **traced number**, and so may a learning rate of
# optax. So build the optimizer *inside* the function, from its arguments, and map the function with
# `jax.vmap` over both and over the seeds. Nothing is compiled twice, and nothing but `vmap` is
# needed: neither a loop nor `optax.inject_hyperparams`. ρ = 0 is the base optimizer itself.


# %%
@jax.jit(static_argnums=(0, 1))
def sweep(variant, base, rhos, rates):
    """Return the validation accuracy in percent, with axes [rho, learning rate, seed]."""

    def run(rho, rate, seed, params, data):
        schedule = optax.cosine_decay_schedule(rate, EPOCHS * STEPS_PER_EPOCH)
        tx = optax.chain(variants[variant](rho), bases[base](schedule))
        params, _ = train(tx, seed, params, data[0])
        return 100 * accuracy(params, data[1])

    over_seeds = jax.vmap(run, in_axes=(None, None, 0, 0, 0))
    over_rates = jax.vmap(over_seeds, in_axes=(None, 0, None, None, None))
    over_rhos = jax.vmap(over_rates, in_axes=(0, None, None, None, None))
    return over_rhos(rhos, rates, tuning, initialize(tuning, WIDTH), split(tuning, 0.3))


# %% [markdown]
# Four maps: SAM and ASAM, each on SGD with momentum and on AdamW. So small a network keeps one CPU
# core busy, and two threads compute two maps at a time. On another task, replace `train` and
# `accuracy`. If the runs do not fit into memory at once, put `jax.lax.map` in place of the outer
# `vmap`: still one program, one value of ρ after the other.


# %%
def draw_map(variant, base):
    rhos, rates = jnp.array(RADII[variant], float), jnp.array(RATES[base])
    return np.asarray(sweep(variant, base, rhos, rates))


pairs = [(variant, base) for base in bases for variant in variants]
with ThreadPoolExecutor(2) as pool:
    maps = dict(zip(pairs, pool.map(draw_map, *zip(*pairs, strict=True)), strict=True))

runs = sum(accuracies.size for accuracies in maps.values())
print(f"{runs} trainings in {len(maps)} compiled programs")


# %%
def optimum(accuracies):
    """Return the position of the best mean over the seeds: index of rho, index of the rate."""
    mean = accuracies.mean(axis=-1)
    return np.unravel_index(mean.argmax(), mean.shape)


def is_interior(accuracies):
    """Return whether there is a worse neighbour on each side; below rho = 0 there is nothing."""
    row, column = optimum(accuracies)
    rows, columns, _ = accuracies.shape
    return row < rows - 1 and 0 < column < columns - 1


print(f"{'':<14}{'rho':>6}{'rate':>8}{'accuracy':>10}  optimum        within 1 point of it")
for (variant, base), accuracies in maps.items():
    row, column = optimum(accuracies)
    mean = accuracies.mean(axis=-1)
    near = f"{(mean > mean.max() - 1).sum()} of {mean.size}"
    place = "inside grid" if is_interior(accuracies) else "AT THE EDGE"
    print(
        f"{variant + ' on ' + base:<14}{RADII[variant][row]:6g}{RATES[base][column]:8g}"
        f"{mean.max():10.1f}  {place:<14} {near}"
    )

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 8.2))
rises = 0
for axis, ((variant, base), accuracies) in zip(axes.flat, maps.items(), strict=True):
    mean, best = accuracies.mean(axis=-1), optimum(accuracies)
    ridge = mean.argmax(axis=0)  # the best rho of each learning rate
    rises += ridge[best[1]] > ridge[0]
    image = axis.imshow(mean, cmap="cividis", vmin=80, vmax=97, origin="lower", aspect="auto")
    for (row, column), value in np.ndenumerate(mean):
        color = "black" if value > 89 else "white"
        weight = "bold" if row == ridge[column] else "normal"
        axis.annotate(f"{value:.1f}", (column, row), ha="center", va="center", color=color)
        axis.texts[-1].set_fontweight(weight)
    for column, row in enumerate(ridge):
        is_best = (row, column) == best
        width, color = (4, figures.RED) if is_best else (2.5, "white")
        square = plt.Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False)
        square.set(linewidth=width, edgecolor=color, zorder=3)
        axis.add_patch(square)
    where = "" if is_interior(accuracies) else ", AT THE EDGE"
    axis.set_title(
        f"{variant} on {base}: best at ρ = {RADII[variant][best[0]]:g}, "
        f"rate {RATES[base][best[1]]:g}{where}"
    )
    axis.set_xticks(range(len(RATES[base])), [f"{rate:g}" for rate in RATES[base]])
    axis.set_yticks(range(len(RADII[variant])), [f"{rho:g}" for rho in RADII[variant]])
    axis.set_ylabel("ρ")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
for axis in axes[-1]:
    axis.set_xlabel("learning rate")
figure.colorbar(image, ax=axes, label="validation accuracy, %", extend="min", shrink=0.6)
figure.suptitle(
    f"In {rises} of {len(maps)} maps the best ρ grows with the learning rate, up to the optimum "
    "(frames: best ρ of each rate; red: best of all)",
    x=0.01,
    ha="left",
)
plt.show()

# %% [markdown]
# ## What the map says
#
# **ρ matters as much as the learning rate.** The first table moves one of the two numbers away from
# the optimum by one cell, a factor of 2 or 2.5.
#
# **Both move together.** The frames climb from the lower left to the red one: a larger learning
# rate wants a larger ρ. If you find the best learning rate *without* SAM, keep it, and then tune ρ
# alone, you stop halfway up. The second table says what that costs.


# %%
def lost(accuracies, rows, columns):
    """Return the points lost in a cell beside the optimum, or NaN outside the grid."""
    mean, (row, column) = accuracies.mean(axis=-1), optimum(accuracies)
    row, column = row + rows, column + columns
    inside = 0 <= row < mean.shape[0] and 0 <= column < mean.shape[1]
    return mean.max() - mean[row, column] if inside else np.nan


print("points lost one cell away      smaller rho    larger rho    smaller rate    larger rate")
for (variant, base), accuracies in maps.items():
    moves = [lost(accuracies, *move) for move in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    print("{:<28}{:14.1f}{:14.1f}{:16.1f}{:15.1f}".format(f"{variant} on {base}", *moves))

print("\nvalidation accuracy       no SAM   rho tuned at that rate    rho and rate tuned together")
for (variant, base), accuracies in maps.items():
    mean = accuracies.mean(axis=-1)
    alone = mean[0].argmax()
    text = f"{mean[:, alone].max():.1f} at rate {RATES[base][alone]:g}"
    row, column = optimum(accuracies)
    both = f"{mean.max():.1f} at rate {RATES[base][column]:g}"
    print(f"{variant + ' on ' + base:<24}{mean[0].max():8.1f}{text:>25}{both:>31}")

# %% [markdown]
# Each accuracy is the best of 25 means over four seeds, on the data it was chosen with. So it is a
# little too high, and cells that differ by half a point are equally good. The shape is what lasts.
# The cliff is above: too large a ρ ruins a run, too small a ρ only helps less. In doubt, take the
# smaller of two.
#
# **How to search with less.** About a dozen runs find the neighbourhood: ρ in {0.05, 0.1, 0.2, 0.5}
# at your learning rate, the best two of them at 2 and at 3 times that rate, then the neighbours of
# the winner. Use the *validation* accuracy, and more seeds where two candidates are close.

# %% [markdown]
# ## Radii of different variants are not comparable
#
# The variants measure distance in different units. Here each trains one network with
# **the same ρ = 0.01**. The table shows how far ε really moves the weights: the reading
# `perturbation_norm`, an ordinary L2 norm, at the start and at the end of training.

# %%
SAME_RHO = 0.01
rate, steps = 0.05, EPOCHS * STEPS_PER_EPOCH
sgd = bases["SGD"](rate)
same_rho = {
    "sam": (optax.chain(samx.sam(SAME_RHO), sgd), "ε has length ρ"),
    "asam": (optax.chain(samx.asam(SAME_RHO), sgd), "in units of each weight's size"),
    "stable_sam": (optax.chain(samx.stable_sam(SAME_RHO), sgd), "ε = ρ g: as long as g makes it"),
    "momentum_sam": (samx.momentum_sam(sgd, SAME_RHO), "length ρ, against the momentum"),
    "lightsam_adam": (samx.lightsam_adam(1e-3, SAME_RHO), "every weight moves by about ρ"),
}
params, data = jax.tree.map(lambda leaf: leaf[0], (initialize(tuning, WIDTH), split(tuning, 0.3)))

print(f"length of ε at rho = {SAME_RHO}    first 10 steps    last 10 steps")
for name, (tx, unit) in same_rho.items():
    tx = samx.all_readings(tx)
    _, readings = jax.jit(lambda tx=tx: train(tx, tuning[0], params, data[0]))()
    norm = readings.perturbation_norm
    print(f"{name:<24}{norm[:10].mean():18.4f}{norm[-10:].mean():17.4f}    {unit}")

# %% [markdown]
# So a ρ that was tuned for one variant says nothing about another. `asam` starts at ten times SAM's
# ρ on ResNets; on the digits it wanted one to five times as much. `stable_sam` and `usam` multiply the
# gradient, so that their perturbation grows and shrinks with it. `lightsam_adagrad` and
# `lightsam_adam` move each of $P$ parameters, hence the whole network by up to about
# $\rho\sqrt{P}$: begin at 0.001. `momentum_sam` has SAM's unit
# and still wants a larger ρ, up to ten times SAM's.
#
# ## Starting values
#
# *Cited*: read in the paper, in its authors' code, or in a message by an author. *Measured*: by us,
# on the digits of this page. *Recalled*: widely used, but we could not read the source again.
#
# | model and data | optimizer | variant | start with ρ | status | source |
# |---|---|---|---|---|---|
# | **ViT, ImageNet** | **AdamW** | `sam` | **0.15** | cited | a maintainer's run, [big_vision] |
# | **ViT, ImageNet** | **AdamW** | `sam` | **0.2 to 0.3** | cited | study of [Momentum-SAM] |
# | **ViT, ImageNet** | **AdamW** | `sam` | **0.1 to 0.2** | recalled | [Chen et al.] |
# | **ViT, ImageNet** | **AdamW** | `gsam`, `alpha` 0.4 to 1 | **0.6 → 0 to 0.2** | cited | [GSAM] |
# | ViT, ImageNet | Lion | `sam`; `sam_on` | 1; 10 | cited | an author, [SAM-ON issue 2] |
# | ViT-S/32, ImageNet | AdamW | `momentum_sam` | 3, 0 in the warm-up | cited | [Momentum-SAM] |
# | CLIP ViT-B/16, adapters | SGD | `focal_sam` | 0.02 to 0.05 | cited | scripts of [Focal-SAM] |
# | T5, fine-tuning | Adafactor | `sam` | 0.15 | recalled | [Bahri et al.] |
# | Mixer, ImageNet | AdamW | `gsam` | 0.5 to 0.7 → 0 to 0.2 | cited | [GSAM] |
# | ResNet, CIFAR-10 | SGD | `sam` | 0.05 | cited | [SAM] |
# | wide ResNet, CIFAR-100 | SGD | `sam` | 0.1 | cited | [SAM] |
# | PyramidNet, CIFAR-100 | SGD | `sam` | 0.2 | cited | [SAM] |
# | ResNet, ImageNet | SGD | `sam` | 0.05 | cited | [SAM] |
# | ResNet, wrong labels | SGD | `sam` | 0.1 | cited | [SAM] |
# | ResNet, ImageNet | SGD | `gsam`, `alpha` 0.01 | 0.04 → 0.02 | cited | [GSAM] |
# | ResNet, CIFAR-10; CIFAR-100 | SGD | `asam` | 0.5; 1 | cited | README of [ASAM]'s code |
# | ResNet-56, CIFAR-10 | SGD | `sampa`, `lam` 0.2 | 0.1 | cited | code of [SAMPa] |
# | CNN, CIFAR-100 | SGD | `momentum_sam` | 3 | cited | [Momentum-SAM] |
# | ResNet-18, CIFAR-100 | SGD | `friendly_sam` | 0.2 | cited | script, [Friendly SAM] |
# | wide ResNet, CIFAR-100 | SGD | `sam_on` | 5 to 10 times SAM's | cited | figure of [SAM-ON] |
# | small MLP, wrong labels | SGD | `sam`; `asam` | 0.2 to 0.4; 0.5 to 1 | measured | above |
# | small MLP, wrong labels | AdamW | `sam`; `asam` | 0.2 to 0.4; 1 | measured | above |
#
# SGD is SGD with momentum. "0.6 → 0.2": ρ falls with the learning rate, from 0.6 to 0.2.
#
# [SAM]: https://arxiv.org/abs/2010.01412
# [ASAM]: https://arxiv.org/abs/2102.11600
# [GSAM]: https://arxiv.org/abs/2203.08065
# [SAMPa]: https://arxiv.org/abs/2410.10683
# [SAM-ON]: https://arxiv.org/abs/2306.04226
# [SAM-ON issue 2]: https://github.com/mueller-mp/SAM-ON/issues/2
# [Momentum-SAM]: https://arxiv.org/abs/2401.12033
# [Friendly SAM]: https://arxiv.org/abs/2403.12350
# [Focal-SAM]: https://arxiv.org/abs/2505.01660
# [Chen et al.]: https://arxiv.org/abs/2106.01548
# [Bahri et al.]: https://arxiv.org/abs/2110.08529
# [big_vision]: https://github.com/google-research/big_vision/pull/8
#
# **So, for a ViT with AdamW:** `samx.sam(0.15)`, then 0.1 and 0.3. Or `samx.gsam` with a ρ that
# follows the learning rate; how to write that is [below](#a-rho-that-changes).
#
# Many of the cited runs computed the perturbation on **each device alone** (Foret et al. with 32
# images for each, GSAM too). In samx that is `data_parallel(..., ascent="local")`; a perturbation
# from the whole batch is another algorithm and may want a smaller ρ.
#
# ## A rho that changes
#
# Every `rho` may be an optax schedule, counted in the steps of the optimizer. Three kinds are used
# in practice:
#
# - **It follows the learning rate** (GSAM): `samx.schedules.following`. The map explains why: small
#   steps want a small ρ. It is the usual choice with a long cosine or linear decay.
# - **It warms up**: any optax schedule. Useful where early training is fragile, as for a ViT.
# - **It is on for a part of the run**: `perturb_if(policies.between(start, stop), ...)`. The other
#   steps cost one gradient.

# %%
row, column = optimum(maps["SAM", "AdamW"])
best_rho, peak = float(RADII["SAM"][row]), RATES["AdamW"][column]
rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
own_peak = RATES["AdamW"][maps["SAM", "AdamW"].mean(axis=-1)[0].argmax()]
own_rate = optax.warmup_cosine_decay_schedule(0.0, own_peak, steps // 10, steps)
following = samx.schedules.following(rate, best_rho, peak_value=peak)
warmup = optax.linear_schedule(0.0, best_rho, steps // 4)
half = steps // 2


def between(start, stop):
    return samx.perturb_if(samx.policies.between(start, stop), samx.sam(best_rho))


scheduled = {
    "constant": samx.sam(best_rho),
    "follows the rate": samx.sam(following),
    "warm-up": samx.sam(warmup),
    "first half only": between(0, half),
    "second half only": between(half, None),
    "no SAM, own rate": optax.identity(),
}

# %% [markdown]
# All use AdamW at the best ρ and learning rate of the map, with a warm-up of the learning rate. The
# last one is AdamW alone, with half the gradients, at the learning rate that is best without SAM.
# The accuracy is that on the **test** images, with ten new seeds. Differences are taken seed by
# seed.

# %%
seeds = jnp.arange(TEST_SEEDS)


def test_accuracy(name, sharp):
    """Return the test accuracy of each seed, and the readings of each of its steps."""
    base = optax.adamw(own_rate if name == "no SAM, own rate" else rate)
    tx = optax.with_extra_args_support(optax.chain(sharp, base))

    def run(seed, params, data):
        params, readings = train(tx, seed, params, data[0])
        return 100 * accuracy(params, data[2]), readings

    return jax.jit(jax.vmap(run))(seeds, initialize(seeds, WIDTH), split(seeds, 0.3))


with ThreadPoolExecutor(2) as pool:
    measured = pool.map(test_accuracy, scheduled, scheduled.values())
    results = dict(zip(scheduled, measured, strict=True))
constant = np.asarray(results["constant"][0])
differences = {}
print(f"{'rho':<18}{'test accuracy':>14}{'minus constant':>18}{'gradients':>11}")
for name, (accuracies, readings) in results.items():
    paired = np.asarray(accuracies) - constant
    differences[name] = paired.mean(), paired.std(ddof=1) / np.sqrt(TEST_SEEDS)
    gradients = steps if readings is None else int(readings.gradients_spent[0, -1])
    print(
        f"{name:<18}{np.mean(accuracies):14.1f}{differences[name][0]:+12.1f} ± "
        f"{differences[name][1]:.1f}{gradients:11d}"
    )

# %%
when = np.arange(steps)
shapes = {
    "constant": np.ones(steps),
    "follows the rate": jax.vmap(following)(when) / best_rho,
    "warm-up": jax.vmap(warmup)(when) / best_rho,
    "first half only": when < half,
    "second half only": when >= half,
    "no SAM, own rate": np.zeros(steps),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=(1, 1.3), sharey=True)
for row, (name, (mean, error)) in enumerate(differences.items()):
    left.fill_between(when, -row, 0.7 * np.asarray(shapes[name]) - row, color=figures.BLUE, lw=0)
    left.axhline(-row, color=figures.INK, linewidth=0.8)
    right.errorbar(mean, 0.3 - row, xerr=error, fmt="o", capsize=4, color=figures.BLUE)
right.axvline(0, color=figures.GREY, linewidth=0.8, zorder=0)
left.set(xlabel="step", title="ρ during training", xlim=(0, steps))
left.set_yticks([0.3 - row for row in range(len(differences))], list(differences))
right.set(xlabel="points of test accuracy, minus constant ρ, seed by seed")
best = max(differences, key=lambda name: differences[name][0])
lead, error = differences[best]
is_better = lead > 2 * error
right.set_title(
    f"Best: {best}, {lead:+.1f} ± {error:.1f}" if is_better else "No schedule beats a constant ρ"
)
for axis in (left, right):
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
plt.show()

# %% [markdown]
# On this short run no schedule beats a constant ρ. The schedule that follows the learning rate and
# the warm-up end within their errors of it. SAM in one half of the run keeps about six tenths of
# its gain over AdamW alone, for half of the extra gradients, and it hardly matters which half.
# Longer runs and other models may differ: GSAM's authors chose a ρ that follows the learning rate,
# and Momentum-SAM's authors found that a ViT needs ρ = 0 in its warm-up.
#
# ## What to check in a run
#
# A ρ that is far too small and a SAM that is wired wrongly look alike: like the base optimizer. The
# readings in the state tell them apart from a SAM that works. Log four of them, as means over an
# epoch:

# %%
readings = jax.tree.map(lambda leaf: leaf[0], results["constant"][1])  # of the first seed
print("epoch   sharpness   rho * grad_norm   sharp_loss   gradients_spent")
for epoch in sorted({0, EPOCHS // 4, EPOCHS // 2, EPOCHS - 1}):
    part = jax.tree.map(
        lambda leaf, epoch=epoch: leaf.reshape(EPOCHS, STEPS_PER_EPOCH)[epoch], readings
    )
    print(
        f"{epoch:5d}{part.sharpness.mean():12.3f}{best_rho * part.grad_norm.mean():18.3f}"
        f"{part.sharp_loss.mean():13.3f}{part.gradients_spent[-1]:18.0f}"
    )

# %% [markdown]
# | reading | expect | otherwise |
# |---|---|---|
# | `sharpness` | at least about ρ · `grad_norm`, the rise of a straight line | 0: ρ is 0, or half precision rounds ε away |
# | `sharp_loss` | of the order of `loss` | far above it, and training stalls: ρ is too large |
# | `gradients_spent` | 2 per step | 1 per step: the policy skips, or SAM is not in the chain |
#
# `samx.all_readings(tx)` adds the norm of the perturbation and the cosine between it and the sharp
# gradient, for some more memory traffic.
#
# ## Where to go next
#
# - [Which variant?](which_variant.ipynb) chooses the variant whose ρ you tune.
# - [SAM in five minutes](sam_in_five_minutes.ipynb) shows what ρ does on a simple surface.
# - [Training loops](training_loops.ipynb) puts SAM into Flax, nnx and Equinox training.
# - [Recipes](recipes.md) has short answers, among them a ρ that warms up.
# - `python examples/digits.py --rho 0.05 0.1 0.2` tries your radii for every variant.
