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
# # Measuring sharpness
#
# "Is it flatter?" has no single answer: there are many measures, and they do not agree. This
# notebook takes two networks, one trained by SGD and one by SAM, and asks all of them. Every
# measure of `samx.sharpness` is a function `(f, params, ...)`: `f` is a loss, and the ball or
# metric that *trains* is also the one that *measures*.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import samx
from examples.common import digits_task, figures
from examples.common.figures import BLUE, GREY, INK, RED
from samx import sharpness
from samx.perturbations import linf_ball, magnitude, metric_ball

figures.use_style()

# %% [markdown]
# ## 1. Two networks
#
# scikit-learn's digits, 1000 images to train on, 30 % of their labels wrong. Both networks start
# from the same weights and spend the same number of gradients: SGD takes twice the steps. The rates
# are those of [SAM in five minutes](sam_in_five_minutes.ipynb).
#
# The loss is written **in two parts**, logits and losses on them. An optimizer of samx takes the
# parts as it takes `losses_fn`, and Gauss-Newton products need them.

# %%
EPOCHS, WIDTH, RHO, BATCH = 40, 32, 0.2, digits_task.BATCH
train_set, _, test_set = digits_task.split_of(0.3, jnp.asarray(0))


def initialize(key):
    keys = jax.random.split(key, 3)
    sizes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)]
    return [
        {"kernel": jax.random.normal(k, size) * (2 / size[0]) ** 0.5, "bias": jnp.zeros(size[1])}
        for k, size in zip(keys, sizes, strict=True)
    ]


def apply_fn(params, batch):
    *hidden, last = params
    x = batch["x"]
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss_on_logits(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def mean_loss(params, batch):
    return loss_on_logits(apply_fn(params, batch), batch).mean()


def train(tx, epochs):
    """Train one network; return its parameters."""

    def step(carry, rows):
        params, state = carry
        batch = digits_task.rows_of(train_set, rows)
        grads = jax.grad(mean_loss)(params, batch)
        updates, state = tx.update(
            grads, state, params, apply_fn=apply_fn, loss_on_logits=loss_on_logits, batch=batch
        )
        return (optax.apply_updates(params, updates), state), None

    params = initialize(jax.random.key(0))
    rows = jax.vmap(lambda epoch: digits_task.shuffled(0, epoch))(jnp.arange(epochs))
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows.reshape(-1, BATCH))
    return params


def sgd(learning_rate, epochs):
    return optax.sgd(optax.cosine_decay_schedule(learning_rate, epochs * 10), momentum=0.9)


networks = {
    "SGD": jax.jit(lambda: train(sgd(0.02, 2 * EPOCHS), 2 * EPOCHS))(),
    "SAM": jax.jit(lambda: train(optax.chain(samx.sam(RHO), sgd(0.1, EPOCHS)), EPOCHS))(),
}
COLORS = {"SGD": RED, "SAM": BLUE}
accuracy = jax.jit(lambda w, data: jnp.mean(apply_fn(w, data).argmax(-1) == data["y"]))
for name, w in networks.items():
    print(
        f"{name}: training loss {mean_loss(w, train_set):.3f}, "
        f"test accuracy {100 * accuracy(w, test_set):.1f} %"
    )

# %% [markdown]
# ## 2. What is measured: the objective
#
# `samx.sharpness.objective` joins the closures and the data. Here it is the whole training set with
# its given labels, split into five batches, of which one at a time is in memory. The examples are
# shuffled, since the wrong labels stand first. A plain function `params -> scalar` would do for
# everything that needs no examples.

# %%
shuffled = digits_task.rows_of(train_set, jax.random.permutation(jax.random.key(2), 1000))
f = sharpness.objective(
    apply_fn=apply_fn, loss_on_logits=loss_on_logits, batch=shuffled, num_batches=5
)


def measured(measure):
    """Measure both networks by one compiled program."""
    compiled = jax.jit(measure)
    return {name: jax.device_get(compiled(f, w)) for name, w in networks.items()}


# %% [markdown]
# ## 3. Curvature
#
# Three matrices are often confused. The **Hessian** is the second derivative of the loss. The
# **Gauss-Newton matrix** is its part that comes from the loss on the logits; for cross-entropy it
# is the Fisher information. The **empirical Fisher matrix** is the mean of $g g^\top$ over the
# gradients of examples. Lanczos' method finds the largest eigenvalues without forming any of them,
# and the residual bounds the error.

# %%
OPERATORS = {"hessian": "Hessian", "ggn": "Gauss-Newton", "empirical_fisher": "empirical Fisher"}
print(f"{'largest eigenvalue':<20}" + "".join(f"{name:>18}" for name in networks))
for operator, title in OPERATORS.items():
    found = measured(lambda f, w, o=operator: sharpness.eigenvalues(f, w, k=1, operator=o)[::2])
    cells = [f"{value[0]:.3f} ± {bound[0]:.0e}" for value, bound in found.values()]
    print(f"{title:<20}" + "".join(f"{cell:>18}" for cell in cells))
traces = measured(lambda f, w: sharpness.trace(f, w, draws=200))
print(f"{'trace of Hessian':<20}" + "".join(f"{m:>12.2f} ± {e:.2f}" for m, e in traces.values()))

# %% [markdown]
# The trace is a mean over random draws, and its standard error is part of the result. The density
# shows all eigenvalues at once: most of them are near zero, and few are large.

# %%
grid = jnp.linspace(-2, 14, 800)
densities = measured(lambda f, w: sharpness.density(f, w, grid, sigma=0.3, iterations=60))
figure, axis = plt.subplots(figsize=(7, 3.4))
for name, (mean, _) in densities.items():
    axis.semilogy(grid, mean, color=COLORS[name], label=name)
axis.set(
    title="Few eigenvalues are large, and SAM's are smaller",
    xlabel="eigenvalue of the Hessian",
    ylabel="density",
    ylim=(1e-6, 3),
)
axis.legend()
plt.show()

# %% [markdown]
# ## 4. Rises in a ball
#
# SAM wants the loss to be low in a whole ball. Three measures look at it. **First order**: the rise
# after SAM's own step, $L(w + \rho \, g / \|g\|) - L(w)$. **Worst case**: the largest rise that an
# ascent from several starts finds. **Average case**: the mean rise after random noise whose
# expected length is the radius.

# %%
radii = jnp.array([0.05, 0.1, 0.2, 0.4, 0.8])
P = sum(x.size for x in jax.tree.leaves(networks["SGD"]))
STYLES = {"worst case": "-", "first order": "--", "average case": ":"}


def rises(f, w):
    def at(rho):
        ball = metric_ball(rho)
        return {
            "worst case": sharpness.worst_case(f, w, ball, steps=25, restarts=4).value,
            "first order": sharpness.first_order(f, w, ball),
            "average case": sharpness.average_case(f, w, rho / P**0.5, draws=50).mean,
        }

    return jax.lax.map(at, radii)


curves = measured(rises)
figure, axis = plt.subplots(figsize=(7, 4))
for name, found in curves.items():
    for what, style in STYLES.items():
        label = f"{name}, {what}"
        axis.loglog(radii, found[what], style, marker="o", color=COLORS[name], label=label)
axis.set(
    title="The worst point of a ball is far above a random one",
    xlabel="radius ρ",
    ylabel="rise of the training loss",
)
axis.set_xticks(radii, [f"{rho:g}" for rho in radii.tolist()], minor=False)
axis.set_xticks([], minor=True)
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# In the worst and the average case SAM's network is the flatter one at every radius. At first order
# it is not: the straight line up the gradient misses the sharp directions, and its rise is mostly
# the length of the gradient on the whole training set.
#
# ## 5. A measure that a rescaling cannot fool
#
# Multiply the first layer of a ReLU network by 4 and divide the second by 4: the function stays the
# same, the weights do not. Plain measures change, although nothing that matters did
# ([Dinh et al., 2017](https://arxiv.org/abs/1703.04933)). **Adaptive** measures scale the ball with
# $|w|$, and stay. The metric is the one that ASAM trains with.


# %%
def rescaled(w, scale=4.0):
    first, second, last = w
    first = jax.tree.map(lambda x: scale * x, first)
    return [first, second | {"kernel": second["kernel"] / scale}, last]


everywhere = magnitude(0.0, is_scaled=lambda *_: True)
BALLS = {
    "L2, ρ = 0.2": metric_ball(0.2),
    "adaptive L2, ρ = 0.2": metric_ball(0.2, everywhere),
    "adaptive L∞, ρ = 0.01": linf_ball(0.01, everywhere),
}
print(f"{'worst case of SGD':<24}{'as trained':>12}{'rescaled':>12}")
for title, ball in BALLS.items():
    measure = jax.jit(lambda w, b=ball: sharpness.worst_case(f, w, b, steps=25, restarts=4).value)
    values = [measure(w) for w in (networks["SGD"], rescaled(networks["SGD"]))]
    print(f"{title:<24}" + "".join(f"{float(value):>12.4f}" for value in values))

# %% [markdown]
# ## 6. On how many examples?
#
# SAM takes its perturbation on a batch, so it flattens the loss of *batches*. **m-sharpness** is
# the mean rise over groups of m examples, each climbed alone. The smaller the group, the larger the
# rise, so compare two networks at the same m. Here even the order depends on it: SAM's network is
# flatter in groups of up to a batch, and not on the whole training set.

# %%
SIZES = (1, 4, 20, 100, 1000)


def over_sizes(f, w):
    return [sharpness.m_sharpness(f, w, metric_ball(RHO), shard_size=m) for m in SIZES]


groups = measured(over_sizes)
figure, axis = plt.subplots(figsize=(7, 3.4))
for name, values in groups.items():
    axis.loglog(SIZES, values, "o-", color=COLORS[name], label=name)
axis.axvline(BATCH, color=GREY, linewidth=0.8)
axis.annotate("batch size in training", (BATCH * 1.1, max(groups["SGD"]) * 0.7), color=INK)
axis.set(
    title="A smaller group of examples has a larger rise",
    xlabel="examples in a group, m",
    ylabel=f"m-sharpness at ρ = {RHO}",
)
axis.legend()
plt.show()

# %% [markdown]
# ## 7. Slices and barriers
#
# A slice shows the loss along a direction. `filter_normalize` scales a random direction to the
# weights, column by column, so that two networks can be compared
# ([Li et al., 2018](https://arxiv.org/abs/1712.09913)). A barrier is the highest point between two
# networks, above the straight line between their losses: 0 means that one valley holds both.

# %%
alphas = jnp.linspace(-1, 1, 41)
POINTS = 41


def slices(f, w):
    def along(key):
        direction = sharpness.filter_normalize(optax.tree.random_like(key, w), w)
        return sharpness.slice_1d(f, w, direction, alphas)

    return jax.lax.map(along, jax.random.split(jax.random.key(1), 5))


between = jax.jit(lambda a, b: sharpness.barrier(f, a, b, points=POINTS))(*networks.values())
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for name, values in measured(slices).items():
    left.plot(alphas, values.T, color=COLORS[name], linewidth=0.6, alpha=0.4)
    left.plot(alphas, values.mean(axis=0), color=COLORS[name], label=name)
left.set(
    title="Five filter-normalized directions, and their mean",
    xlabel="distance, in sizes of the weights",
    ylabel="training loss",
    ylim=(0, 8),
)
left.legend()
right.plot(np.linspace(0, 1, POINTS), between.losses, color=INK)
right.set(
    title=f"The barrier between the networks is {float(between.height):.2f} high",
    xlabel="from SGD (0) to SAM (1)",
    ylabel="training loss",
)
plt.show()

# %% [markdown]
# ## 8. During training: a monitor, and the edge of stability
#
# `samx.sharpness.monitor` stands in the chain, measures every so many steps in a real branch, and
# keeps the last values in the state. What it finds is predicted by a law without a free parameter.
# Full-batch gradient descent sharpens until its largest eigenvalue λ reaches the **edge of
# stability**, 2/η ([Cohen et al., 2021](https://arxiv.org/abs/2103.00065)). SAM has an edge of its
# own, which depends on the gradient and is lower
# ([Long, Bartlett, 2024](https://arxiv.org/abs/2309.12488)):
#
# $$\lambda \, (1 + r \lambda) = \frac{2}{\eta}, \qquad r = \frac{\rho}{\|\nabla L(w)\|}.$$

# %%
EDGE_RATE, EDGE_RHO, EDGE_STEPS, EVERY = 0.2, 0.05, 1500, 50
images = test_set["x"][:300] - test_set["x"][:300].mean()
targets = jax.nn.one_hot(test_set["y"][:300], 10)


def edge_loss(params):
    x = images
    for kernel in params[:-1]:
        x = jnp.tanh(x @ kernel)
    return 0.5 * jnp.mean(jnp.sum((x @ params[-1] - targets) ** 2, axis=1))


def follow(tx, rho):
    """Train with a monitor; return the measured eigenvalue and the predicted edge over time."""
    monitor = sharpness.monitor(
        {
            "top": lambda f, w: sharpness.eigenvalues(f, w, k=1, iterations=15).values[0],
            "grad_norm": lambda f, w: optax.tree.norm(jax.grad(f)(w)),
        },
        every=EVERY,
    )
    tx = optax.chain(tx, monitor)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(edge_loss)(params)
        updates, state = tx.update(grads, state, params, value_fn=edge_loss)
        return (optax.apply_updates(params, updates), state), state[-1].monitored.values

    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((64, 24), (24, 24), (24, 10))
    params = [
        jax.random.normal(key, size) / size[0] ** 0.5 for key, size in zip(keys, sizes, strict=True)
    ]
    _, seen = jax.lax.scan(step, (params, tx.init(params)), length=EDGE_STEPS)
    seen = {name: values[::EVERY] for name, values in seen.items()}
    edge = sharpness.edge(EDGE_RATE, radius=rho / seen["grad_norm"])
    return seen["top"], edge


steps = np.arange(0, EDGE_STEPS, EVERY)
runs = {
    "gradient descent": (optax.sgd(EDGE_RATE), 0.0, RED),
    f"SAM, ρ = {EDGE_RHO}": (optax.chain(samx.sam(EDGE_RHO), optax.sgd(EDGE_RATE)), EDGE_RHO, BLUE),
}
figure, axis = plt.subplots(figsize=(8, 4))
for name, (tx, rho, color) in runs.items():
    top, edge = jax.jit(lambda tx=tx, rho=rho: follow(tx, rho))()
    axis.semilogy(steps, top, "o", markersize=3, color=color, label=f"{name}: measured")
    axis.semilogy(steps, edge, color=color, linewidth=1.2, label=f"{name}: predicted edge")
    late = slice(len(steps) // 2, None)
    print(f"{name:<18} measured / predicted: {float(jnp.mean((top / edge)[late])):.3f}")
axis.set(
    title="Both settle on the edge that the law predicts",
    xlabel="steps",
    ylabel="largest eigenvalue of the Hessian",
    ylim=(1, 40),
)
axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
axis.set_yticks([], minor=True)
axis.legend(ncols=2)
plt.show()

# %% [markdown]
# ## 9. What to trust
#
# | measure | read it with |
# |---|---|
# | eigenvalues | their residuals: a large one asks for more iterations |
# | trace, diagonal, density, average case | their standard errors; 30 draws give a trace to about 5 % |
# | worst case | a single ascent is a lower bound: look at all restarts and at `stationarity` |
# | first order | it falls short of the worst case at large radii |
# | m-sharpness | the number of examples: values at different m cannot be compared |
# | anything plain | a rescaling of layers changes it; adaptive measures stay |
# | slices | one direction of thousands; normalize it |
# | the edge | full batches and squared error; with cross-entropy λ falls below it late in training |
#
# Turn dropout off and use stored statistics of BatchNorm, or the loss is another function in each
# batch. And none of these numbers is generalization itself: on this task SAM has the better
# accuracy and is flatter in most of them, elsewhere flatness and accuracy disagree
# ([Andriushchenko et al., 2023](https://arxiv.org/abs/2302.07011)).
#
# `examples/measure/sharpness.py` measures checkpoints in every way, `examples/measure/sharpness_cost.py` says
# what each measure costs, and `examples/measure/edge_of_stability.py` tests the law on more
# optimizers.
