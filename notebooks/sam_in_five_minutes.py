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
# # SAM in five minutes
#
# Two networks can fit the training set equally well and differ on new data. One guess about why:
# around one of them the loss is *flat*, around the other it is *sharp*, and the test loss is never
# quite in the same place as the training loss. **Sharpness-aware minimization** (SAM,
# [Foret et al., 2021](https://arxiv.org/abs/2010.01412)) therefore does not minimize the loss
# $L(w)$ but the worst loss nearby, $\max_{\|\epsilon\| \le \rho} L(w + \epsilon)$. It takes one
# step up the gradient to find a bad neighbour, and descends with the gradient found there:
#
# $$\epsilon = \rho \, \frac{\nabla L(w)}{\|\nabla L(w)\|}, \qquad
#   w \leftarrow w - \eta \, \nabla L(w + \epsilon).$$
#
# That is the whole algorithm. `samx.sam(rho)` replaces the gradient by $\nabla L(w + \epsilon)$,
# and any optax optimizer after it takes the step.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import samx
from examples.common import figures
from examples.common.figures import BLUE, GREY, INK, RED

figures.use_style()

# %% [markdown]
# ## 1. What a sharp minimum is
#
# A loss of two parameters, a long valley with a narrow pit in its wall:
#
# $$L(x, y) = \tfrac{1}{10}(x - 1)^2 + \tfrac{1}{2} y^2
#   - \tfrac{1}{2} \exp\!\big(-8 (x + \tfrac{1}{2})^2 - 8 (y - \tfrac{4}{5})^2\big).$$
#
# It has two minima that are (almost exactly) equally good. Only their curvature tells them apart.


# %%
def surface(w):
    x, y = w
    valley = (x - 1) ** 2 / 10 + y**2 / 2
    pit = jnp.exp(-8 * (x + 0.5) ** 2 - 8 * (y - 0.8) ** 2) / 2
    return valley - pit


def descend(tx, start, steps):
    """The path of an optimizer on the surface, and where it ends."""

    def step(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(surface)(w)
        updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=surface)
        return (optax.apply_updates(w, updates), state), w

    (end, _), path = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return path, end


flat = jnp.array([1.0, 0.0])
_, sharp = descend(optax.sgd(0.05), jnp.array([-0.5, 0.8]), 2000)
for name, minimum in (("sharp", sharp), ("flat", flat)):
    curvature = jnp.linalg.eigvalsh(jax.hessian(surface)(minimum)).max()
    print(
        f"{name:>5} minimum at ({minimum[0]:+.2f}, {minimum[1]:+.2f}):"
        f" loss {float(surface(minimum)):z.3f}, largest curvature {curvature:.1f}"
    )

# %%
LEARNING_RATE, RHO = 0.15, 0.5
start = jnp.array([-1.7, 1.5])
gd_path, _ = descend(optax.sgd(LEARNING_RATE), start, 80)
sam_path, _ = descend(optax.chain(samx.sam(RHO), optax.sgd(LEARNING_RATE)), start, 80)
gradients = jax.vmap(jax.grad(surface))(sam_path)
arrows = RHO * gradients / jnp.linalg.norm(gradients, axis=1, keepdims=True)


def worst(w, rho):
    """What SAM wants to be small: the highest loss within `rho`."""
    angle, radius = jnp.meshgrid(jnp.linspace(0, 2 * jnp.pi, 64), jnp.linspace(0, rho, 16))
    disc = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)
    return jax.vmap(jax.vmap(surface))(w + disc).max()


x, y = jnp.meshgrid(jnp.linspace(-2.2, 1.8, 161), jnp.linspace(-0.75, 2.15, 117))
height = jax.vmap(jax.vmap(surface))(jnp.stack([x, y], axis=-1))
along = jnp.linspace(-0.5, 1.5, 161)  # 0 at the sharp minimum, 1 at the flat one
section = sharp + along[:, None] * (flat - sharp)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.45, 1))
levels = np.linspace(0, 1.7, 26) ** 2  # dense where the loss is low, so that the pit shows
left.contourf(x, y, height, levels=levels, cmap="Greys", alpha=0.35, extend="max")
left.contour(x, y, height, levels=levels, colors=GREY, linewidths=0.6)
left.quiver(
    *sam_path[:20].T,
    *arrows[:20].T,
    **dict(angles="xy", scale_units="xy", scale=1, width=0.004, color=BLUE, alpha=0.4),
)
for path, color in ((gd_path, RED), (sam_path, BLUE)):
    left.plot(*path.T, "o-", color=color, markersize=4, linewidth=1.5)
left.plot(*start, "o", color=INK, markersize=9)
for text, place, color in (
    ("start", (-1.6, 1.62), INK),
    ("sharp minimum", (-0.42, 1.28), INK),
    ("flat minimum", (0.72, 0.2), INK),
    ("gradient descent", (-0.3, 0.33), RED),
    ("SAM", (-0.25, -0.2), BLUE),
    ("its perturbations ε", (-2.15, -0.35), BLUE),
):
    left.annotate(text, place, color=color)
left.plot(*jnp.stack([sharp, flat]).T, "+", color=INK, markersize=11, markeredgewidth=2)
left.set(title="SAM walks past the sharp minimum", xlabel="x", ylabel="y", aspect="equal")

right.plot(along, jax.vmap(surface)(section), color=INK)
right.plot(along, jax.vmap(worst, (0, None))(section, RHO), "--", color=BLUE)
right.set(title="At radius ρ the sharp minimum is higher", ylabel="loss", ylim=(-0.05, 1.3))
right.set_xticks([0, 1], ["sharp\nminimum", "flat\nminimum"])
right.annotate("L(w)", (0.24, 0.23), color=INK)
right.annotate("highest L within ρ of w", (0.38, 0.62), color=BLUE)
plt.show()

# %% [markdown]
# Gradient descent curls into the pit. SAM looks from the tips of the arrows, which lie outside of
# the pit, and walks past it. On the right is the reason: at radius ρ the two minima are no longer
# equally good.
#
# This start, ρ and learning rate were **chosen to show it**. Here is what happens from a whole grid
# of starts.

# %%
starts = jnp.stack(jnp.meshgrid(jnp.linspace(-2, 2, 41), jnp.linspace(-1, 2, 31)), -1).reshape(
    -1, 2
)
print(f"{f'{len(starts)} starts':<16} {'sharp':>6} {'flat':>6} {'neither':>8}")
for rho in (0.0, 0.1, 0.2, 0.5):
    tx = optax.chain(samx.sam(rho), optax.sgd(LEARNING_RATE))
    ends = jax.jit(jax.vmap(lambda w, tx=tx: descend(tx, w, 600)[1]))(starts)
    at_sharp = (jnp.linalg.norm(ends - sharp, axis=1) < 0.3).mean()
    at_flat = (jnp.linalg.norm(ends - flat, axis=1) < 0.3).mean()
    name = f"SAM, rho = {rho}" if rho else "gradient descent"
    print(f"{name:<16} {at_sharp:6.0%} {at_flat:6.0%} {1 - at_sharp - at_flat:8.0%}")

# %% [markdown]
# With a large enough ρ no start ends in the pit. But of those that fell into it, only about one in
# five now reaches the flat minimum. The others, and a few that gradient descent led there, hover
# beside the pit, about ρ away, where the perturbed point lands in it. SAM avoids sharp places; it
# does not search for the flattest one.

# %% [markdown]
# ## 2. The closure
#
# SAM needs a second gradient, at a point that only the optimizer knows. So the optimizer gets the
# loss itself, as a function of the parameters: `value_fn`. (The keywords `value`, `grad` and
# `value_fn` are those of optax's line searches.) This is the whole contract:


# %%
def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


tx = optax.chain(samx.sam(rho=0.05), optax.sgd(0.1, momentum=0.9))


@jax.jit
def step(params, state, batch):
    value, grad = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(
        grad, state, params, value=value, grad=grad, value_fn=lambda p: loss(p, batch)
    )
    return optax.apply_updates(params, updates), state


# %% [markdown]
# `batch` is captured by the closure, so both gradients see the same examples. `sam` stands first in
# the chain; clipping, weight decay and the base optimizer see only the sharp gradient it returns.
# One call of `step` is one step of the optimizer and costs **two gradients**, one after the other.
#
# A SAM that silently does nothing looks just like its base optimizer. So every state keeps
# *readings* of what the last step saw:

# %%
batch = {"x": jax.random.normal(jax.random.key(0), (32, 3)), "y": jnp.ones(32)}
params = {"w": jnp.zeros(3)}
state = tx.init(params)
for _ in range(5):
    params, state = step(params, state, batch)

for name, reading in optax.tree.get(state, "readings")._asdict().items():
    if reading is not None:  # three more are there on request: samx.all_readings(tx)
        print(f"{name:<18} {float(reading):.4g}")

# %% [markdown]
# What to check: `sharpness`, the rise of the loss, is about `rho * grad_norm` or more, and five steps
# spent ten gradients. Forget the closure and samx says what is missing:

# %%
try:
    tx.update(params, state, params)
except ValueError as error:
    print(error)

# %% [markdown]
# ## 3. Digits with wrong labels
#
# A small Flax network learns scikit-learn's 8×8 digits from 1000 images, **30 % of which carry a
# wrong label**. `nnx.split` takes the network apart into a graph and its parameters, `nnx.merge`
# puts it together inside the loss. Every seed has a split, wrong labels, initial weights and
# batches of its own, and all seeds train at once under `vmap`.

# %%
images, digits = load_digits(return_X_y=True)
images, digits = jnp.asarray(images / 16, jnp.float32), jnp.asarray(digits, jnp.int32)
TRAIN, TEST, BATCH, SEEDS = 1000, 500, 100, 10


def make_data(seed, noise):
    """Training images with true and (partly wrong) given labels, and a test set."""
    split_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(1), seed))
    order = jax.random.permutation(split_key, len(images))
    train, test = order[:TRAIN], order[-TEST:]
    is_wrong = jnp.arange(TRAIN) < noise * TRAIN
    other = (digits[train] + jax.random.randint(label_key, (TRAIN,), 1, 10)) % 10
    given = jnp.where(is_wrong, other, digits[train])
    return (
        {"x": images[train], "y": given, "is_wrong": is_wrong},
        {"x": images[test], "y": digits[test]},
    )


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


graph, _ = nnx.split(MLP(nnx.Rngs(0)))


def logits(params, x):
    return nnx.merge(graph, params)(x)


def cross_entropy(params, batch):
    scores = logits(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()


# %%
def train(make_tx, epochs, learning_rate, noise, seed):
    """Train one network; returns its parameters and two curves over the epochs."""
    init_key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(2), seed))
    train_set, test_set = make_data(seed, noise)
    schedule = optax.cosine_decay_schedule(learning_rate, epochs * TRAIN // BATCH)
    tx = make_tx(optax.sgd(schedule, momentum=0.9))
    _, params = nnx.split(MLP(nnx.Rngs(init_key)))

    def step(carry, rows):
        params, state = carry
        batch = jax.tree.map(lambda leaf: leaf[rows], train_set)
        value, grad = jax.value_and_grad(cross_entropy)(params, batch)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=lambda p: cross_entropy(p, batch)
        )
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, TRAIN).reshape(-1, BATCH)
        carry, _ = jax.lax.scan(step, carry, order)
        test_hits = logits(carry[0], test_set["x"]).argmax(-1) == test_set["y"]
        train_hits = logits(carry[0], train_set["x"]).argmax(-1) == train_set["y"]
        return carry, (test_hits.mean(), train_hits.mean(where=train_set["is_wrong"]))

    carry = params, tx.init(params)
    (params, _), curves = jax.lax.scan(epoch, carry, jax.random.split(order_key, epochs))
    return params, curves


def over_seeds(make_tx, epochs):
    """`(learning_rate, noise) -> parameters and curves` with a leading axis of seeds."""

    def run(learning_rate, noise):
        return jax.vmap(lambda seed: train(make_tx, epochs, learning_rate, noise, seed))(
            jnp.arange(SEEDS)
        )

    return jax.jit(run)


EPOCHS = 40
sam = over_seeds(lambda base: optax.chain(samx.sam(rho=0.2), base), EPOCHS)
sgd, sgd_twice = over_seeds(lambda base: base, EPOCHS), over_seeds(lambda base: base, 2 * EPOCHS)

# %% [markdown]
# The fair comparison has **equal gradients**, so SGD (with momentum) also runs with twice the
# epochs. The learning rates and ρ = 0.2 come from a search on validation images, for each method
# alone, as in `examples/digits.py`: no better value lies beside them. SGD at SAM's rate is shown
# too.

# %%
SAM_RATE, SGD_RATE, TWICE_RATE = 0.1, 0.05, 0.02
SAM, TWICE, FAST = "SAM", "SGD, its best rate", "SGD, SAM's rate"
runs = {
    SAM: sam(SAM_RATE, 0.3),
    TWICE: sgd_twice(TWICE_RATE, 0.3),
    FAST: sgd_twice(SAM_RATE, 0.3),
}
COLORS = dict(zip(runs, (BLUE, RED, GREY), strict=True))
STYLES = dict(zip(runs, ("-", "--", ":"), strict=True))


def mean_and_error(values):
    """Mean over the seeds, in percent, and its standard error."""
    values = 100 * np.asarray(values, np.float64)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def final(run):
    """The test accuracy of each seed after the last epoch."""
    return np.asarray(run[1][0][:, -1])


def report(title, accuracies):
    """Print accuracies, and what SAM leads the better tuned SGD by, seed by seed."""
    print(f"{title:<32}test accuracy, mean ± standard error of {SEEDS} seeds")
    for name, test in accuracies.items():
        print("{:<32}{:5.1f} ± {:.1f} %".format(name, *mean_and_error(test)))
    sam_test, *tuned = list(accuracies.values())[:3]
    mean, error = mean_and_error(sam_test - max(tuned, key=np.mean))
    print(f"SAM minus the better tuned SGD: {mean:+.1f} ± {error:.1f} points")
    return mean, error


lead, error = report(
    "30% wrong labels",
    {
        f"SAM, lr {SAM_RATE}": final(runs[SAM]),
        f"SGD, lr {TWICE_RATE}, twice the epochs": final(runs[TWICE]),
        f"SGD, lr {SGD_RATE}": final(sgd(SGD_RATE, 0.3)),
        f"SGD, lr {SAM_RATE}, twice the epochs": final(runs[FAST]),
    },
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
for name, (_, curves) in runs.items():
    for axis, curve in zip(axes, curves, strict=True):
        mean, deviation = mean_and_error(curve)
        spent = np.linspace(0, 2 * EPOCHS * TRAIN // BATCH, len(mean) + 1)[1:]
        axis.plot(spent, mean, STYLES[name], color=COLORS[name], label=name)
        band = mean - deviation, mean + deviation
        axis.fill_between(spent, *band, color=COLORS[name], alpha=0.25, lw=0)
for axis in axes:
    axis.set(xlabel="gradients spent", xlim=(0, 2 * EPOCHS * TRAIN // BATCH))
axes[0].set(title=f"SAM leads the better SGD by {lead:.1f} ± {error:.1f} points", ylim=(70, 100))
axes[0].set_ylabel("test accuracy, %")
wrong = {name: mean_and_error(curves[1][:, -1])[0] for name, (_, curves) in runs.items()}
axes[1].set(title=f"At SAM's rate SGD fits {wrong[FAST]:.0f}% of the wrong labels", ylim=(0, 80))
axes[1].set_ylabel("wrong labels fitted, %")
for axis in axes:
    figures.label_ends(axis)
plt.show()

# %% [markdown]
# Bands are one standard error. At SAM's rate SGD first learns the digits and then most of the wrong
# labels, and its test accuracy falls. SAM trains at that same rate and hardly learns them. A small
# rate protects SGD too, which makes it the fair opponent: against it SAM's lead is one and a half
# points, not fourteen. Now the same with **clean labels**, each method at its rate for those:

# %%
_ = report(
    "clean labels",
    {
        "SAM, lr 0.2": final(sam(0.2, 0.0)),
        "SGD, lr 0.3, twice the epochs": final(sgd_twice(0.3, 0.0)),
        "SGD, lr 0.2": final(sgd(0.2, 0.0)),
    },
)
# %% [markdown]
# ## 4. The landscape around the solutions
#
# Seed 0 of each run, and always the training loss with the **given labels**, wrong ones included.
# Left: a walk from the final weights in random directions; each column of a direction is scaled to
# the norm of the weights it changes, so that 0.5 means "moved by half their size". Right: SAM's own
# view, the rise of the loss at $w + \rho \, g / \|g\|$ against ρ, averaged over batches of 100 as in
# training. `samx.sharpness` has both, and [many more measures](measuring_sharpness.ipynb).

# %%
train_set, _ = make_data(0, 0.3)
distances, radii = jnp.linspace(-0.5, 0.5, 41), jnp.linspace(0, 1, 21)


def losses_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"])


order = jax.random.permutation(jax.random.key(4), TRAIN)  # the wrong labels stand first
shuffled = jax.tree.map(lambda leaf: leaf[order], train_set)
f = samx.sharpness.objective(losses_fn=losses_fn, batch=shuffled)


@jax.jit
def landscape(params):
    def random_walk(key):
        direction = optax.tree.random_like(key, params)
        direction = samx.sharpness.filter_normalize(direction, params)
        return samx.sharpness.slice_1d(f, params, direction, distances)

    def climb(radius):
        ball = samx.perturbations.metric_ball(radius)
        on_batches = samx.sharpness.m_sharpness(f, params, ball, shard_size=BATCH)
        return on_batches, samx.sharpness.first_order(f, params, ball)

    walks = jax.lax.map(random_walk, jax.random.split(jax.random.key(3), 10))
    return walks, *jax.lax.map(climb, radii), f(params)


figure, (left, right) = plt.subplots(1, 2)
print("training loss         at w    its rise at ρ = 0.2 on a batch    on the whole training set")
for name, (params, _) in runs.items():
    walks, climbs, full, value = landscape(jax.tree.map(lambda leaf: leaf[0], params))
    left.plot(distances, walks.T, color=COLORS[name], linewidth=0.5, alpha=0.35)
    left.plot(distances, walks.mean(axis=0), STYLES[name], color=COLORS[name], label=name)
    right.plot(radii, climbs, STYLES[name], color=COLORS[name])
    rise, full_rise = (np.interp(0.2, radii, curve) for curve in (climbs, full))
    print(f"{name:<18} {value:7.2f} {rise:33.3f} {full_rise:28.3f}")
right.axvline(0.2, color=INK, linewidth=0.8)
right.annotate("ρ in training", (0.22, 2.7))
left.set(title="SAM's loss rises least in random directions", xlabel="relative distance")
right.set(title="… and up the gradient of a batch", xlabel="ρ", ylabel="rise of the training loss")
left.set_ylabel("training loss")
figures.label_ends(left)
plt.show()

# %% [markdown]
# SGD at SAM's rate has the lowest training loss, at the bottom of the steepest valley: it fitted
# most of the wrong labels. SAM's loss is nearly as high as that of SGD at its best rate, and it
# rises only half as much, in random directions and up the gradient of a batch. The last column of
# numbers is a warning: what SAM flattened is the loss of *batches*, where it took its
# perturbations. Up the gradient of the whole training set, SGD at its best rate is no sharper.
#
# ## 5. Where to go next
#
# - [Which variant?](which_variant.ipynb) chooses by budget and situation.
# - [How to choose rho](choosing_rho.ipynb) sweeps ρ and the learning rate together, and has
#   starting values for ResNets and vision transformers.
# - [Training loops](training_loops.ipynb) has Flax, nnx, Equinox, BatchNorm and half precision.
# - [Recipes](recipes.md) answer short questions, and [Coming from another
#   library](coming_from.ipynb) translates code that you have.
#
# And the fine print. Wrong labels are where SAM shines; on the clean digits above there is little
# or nothing to gain. A step costs two gradients, so compare at equal gradients, as here, or at
# equal time. ρ matters as much as the learning rate, and the good values depend on the task: choose
# both on validation data. And flatness is a guess about why SAM helps, not a proof.
