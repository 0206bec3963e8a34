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
# # Training loops: Flax, Equinox and plain optax
#
# After this page you can put any variant of samx into the training loop that you already have:
# plain optax, Flax linen, Flax nnx or Equinox, with BatchNorm, dropout, half precision, gradient
# accumulation and checkpoints. It runs in about a minute. You should know
# [the closure](sam_in_five_minutes.ipynb) that a variant takes.
#
# The method of this page: one small network, the same initial weights, the same batches, and four
# training loops. If all four loops take the same steps, their loss curves lie on one another.

# %%
import functools
import pickle
import tempfile

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

import samx
import samx.flax
from examples.common import figures

figures.use_style()
STEPS, BATCH, WIDTH, RHO, LEARNING_RATE = 150, 100, 64, 0.1, 0.1
MOMENTUM, EPSILON = 0.9, 1e-5  # of BatchNorm, the same in all frameworks

# %% [markdown]
# ## One network and its data
#
# The data are scikit-learn's digits. The network has a hidden layer, BatchNorm and a ReLU. Its
# initial weights are NumPy arrays, which every framework gets.

# %%
images, digits = load_digits(return_X_y=True)
images, digits = jnp.asarray(images / 16, jnp.float32), jnp.asarray(digits, jnp.int32)
draw = np.random.default_rng(0)
rows = draw.integers(len(images), size=(STEPS, BATCH))
batches = [{"x": images[row], "y": digits[row]} for row in rows]
weights = {
    "first": {"kernel": draw.normal(size=(64, WIDTH)) / 8, "bias": np.zeros(WIDTH)},
    "norm": {"scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)},
    "last": {"kernel": draw.normal(size=(WIDTH, 10)) / 8, "bias": np.zeros(10)},
}
weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)


def cross_entropies(logits, batch):  # one loss per example, [B]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def make_base():
    return optax.sgd(LEARNING_RATE, momentum=0.9)


sam = optax.chain(samx.sam(RHO), make_base())
curves, statistics = {}, {}

# %% [markdown]
# ## Plain optax
#
# Without a framework, BatchNorm is written by hand. The loss returns the running statistics as
# *aux*. Only your own pass, `jax.value_and_grad` below, returns an aux that you keep. samx ignores
# the aux of the extra passes, so the statistics move once per step, although SAM calls the loss
# twice.


# %%
def plain_losses(params, running, batch):
    x = batch["x"] @ params["first"]["kernel"] + params["first"]["bias"]
    seen = {"mean": x.mean(0), "var": x.var(0)}
    moved = jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, running, seen)
    x = (x - seen["mean"]) / jnp.sqrt(seen["var"] + EPSILON)
    x = jax.nn.relu(x * params["norm"]["scale"] + params["norm"]["bias"])
    return cross_entropies(x @ params["last"]["kernel"] + params["last"]["bias"], batch), moved


@jax.jit
def plain_step(params, opt_state, running, batch):
    def value_fn(params):
        losses, moved = plain_losses(params, running, batch)
        return losses.mean(), moved

    (value, moved), grads = jax.value_and_grad(value_fn, has_aux=True)(params)
    updates, opt_state = sam.update(grads, opt_state, params, value=value, value_fn=value_fn)
    return optax.apply_updates(params, updates), opt_state, moved, value


params, opt_state = weights, sam.init(weights)
running, losses = {"mean": jnp.zeros(WIDTH), "var": jnp.ones(WIDTH)}, []
for batch in batches:
    params, opt_state, running, value = plain_step(params, opt_state, running, batch)
    losses.append(value)
curves["plain optax"], statistics["plain optax"] = np.array(losses), running
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

# %% [markdown]
# ## Flax linen
#
# `samx.flax.TrainState` is Flax's own `TrainState` with two changes. Its `apply_gradients` takes
# the closures, and passes them to the optimizer. It also carries `batch_stats` and a random key.
#
# The step below passes `losses_fn` and `batch`. So it takes **every** variant, also those that look
# at single examples: only the line that builds `tx` changes.


# %%
class LinenNet(nn.Module):
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(WIDTH, dtype=self.dtype, name="first")(x)
        x = nn.BatchNorm(not train, momentum=MOMENTUM, dtype=self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(10, dtype=self.dtype, name="last")(x)


@functools.cache  # equal networks share their compiled steps
def linen_net(**options):
    net = LinenNet(**options)
    init = jax.jit(functools.partial(net.init, train=False))
    return net, init(jax.random.key(0), images[:1])


def linen_state(tx, **options):
    net, variables = linen_net(**options)
    return samx.flax.TrainState.create(
        apply_fn=net.apply,
        params=weights,
        batch_stats=variables["batch_stats"],
        key=jax.random.key(1),
        tx=tx,
    )


@functools.partial(jax.jit, static_argnames="masks")
def linen_step(state, batch, masks="same"):
    def losses_fn(params, batch):
        logits, moved = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"],
            train=True,
            rngs=state.rngs("dropout", masks=masks),
            mutable=["batch_stats"],
        )
        return cross_entropies(logits.astype(jnp.float32), batch), moved["batch_stats"]

    def value_fn(params):
        losses, moved = losses_fn(params, batch)
        return losses.mean(), moved

    (value, moved), grads = jax.value_and_grad(value_fn, has_aux=True)(state.params)
    state = state.apply_gradients(
        grads=grads, value=value, losses_fn=losses_fn, batch=batch, batch_stats=moved
    )
    return state, optax.tree.get(state.opt_state, "loss")


state, losses = linen_state(sam), []
for batch in batches:
    state, value = linen_step(state, batch)
    losses.append(value)
curves["Flax linen"], statistics["Flax linen"] = np.array(losses), state.batch_stats["norm"]

# %% [markdown]
# ## Flax nnx
#
# An nnx model holds its parameters. `samx.flax.closure` turns the model and a loss into a function
# of the parameters, and `nnx.Optimizer.update` takes it as one more argument. Make the closure
# **before** your own pass: your own pass moves the statistics and the dropout counters, and all
# passes of a step must start from the same ones.


# %%
class Net(nnx.Module):
    def __init__(self, dropout=0.0, *, rngs):
        self.first = nnx.Linear(64, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.norm(self.first(x)))
        return self.last(self.dropout(x, rngs=rngs))


def nnx_losses(model, batch):
    return cross_entropies(model(batch["x"]), batch)


@nnx.jit
def nnx_step(model, optimizer, batch):
    losses_fn = samx.flax.closure(model, nnx_losses)
    value, grads = nnx.value_and_grad(lambda model: nnx_losses(model, batch).mean())(model)
    optimizer.update(model, grads, value=value, losses_fn=losses_fn, batch=batch)
    samx.flax.keep_aux(model, optimizer)  # for variants with a pass of their own, see below
    return value


def nnx_model(**options):
    model = Net(rngs=nnx.Rngs(params=0, dropout=1), **options)
    nnx.update(model, weights)
    return model


model = nnx_model()
optimizer = nnx.Optimizer(model, sam, wrt=nnx.Param)
curves["Flax nnx"] = np.array([nnx_step(model, optimizer, batch) for batch in batches])
statistics["Flax nnx"] = {"mean": model.norm.mean[...], "var": model.norm.var[...]}

# %% [markdown]
# ## Equinox
#
# An Equinox model is a pytree that also holds things that are not trained: functions, integers.
# `eqx.partition` takes the parameters out, and `eqx.combine` puts the model together again inside
# the closure. BatchNorm's statistics live in a state beside the model.


# %%
class EquinoxNet(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Linear(64, WIDTH, key=key)
        self.norm = eqx.nn.BatchNorm(
            WIDTH, axis_name="batch", mode="batch", momentum=MOMENTUM, eps=EPSILON
        )
        self.last = eqx.nn.Linear(WIDTH, 10, key=key)

    def __call__(self, x, running):  # of one example
        x, running = self.norm(self.first(x), running)
        return self.last(jax.nn.relu(x)), running


def equinox_losses(model, running, batch):
    model = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    logits, running = model(batch["x"], running)
    return cross_entropies(logits, batch), running


@eqx.filter_jit
def equinox_step(model, running, opt_state, batch):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def value_fn(params):
        losses, moved = equinox_losses(eqx.combine(params, static), running, batch)
        return losses.mean(), moved

    (value, moved), grads = jax.value_and_grad(value_fn, has_aux=True)(params)
    updates, opt_state = sam.update(grads, opt_state, params, value=value, value_fn=value_fn)
    return eqx.apply_updates(model, updates), moved, opt_state, value


model, running = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0))
model = eqx.tree_at(
    lambda m: (m.first.weight, m.first.bias, m.last.weight, m.last.bias),
    model,
    (
        weights["first"]["kernel"].T,
        weights["first"]["bias"],
        weights["last"]["kernel"].T,
        weights["last"]["bias"],
    ),
)
opt_state, losses = sam.init(eqx.filter(model, eqx.is_inexact_array)), []
for batch in batches:
    model, running, opt_state, value = equinox_step(model, running, opt_state, batch)
    losses.append(value)
curves["Equinox"] = np.array(losses)
statistics["Equinox"] = dict(
    zip(("mean", "var"), running.get(model.norm.batch_state_index), strict=True)
)
print(
    f"{STEPS} steps, {int(optax.tree.get(opt_state, 'gradients_spent'))} gradients,"
    f" BatchNorm moved {int(running.get(model.norm.batch_counter))} times"
)

# %% [markdown]
# ## Four loops, one curve
#
# All four print the same loss and end with the same running statistics. What is left is rounding of
# float32: the frameworks compute the mean and the variance of a batch in another order.

# %%
reference, *others = curves
largest = max(abs(curves[name] - curves[reference]).max() for name in others)
print(f"{'':<12} {'last loss':>10} {'largest difference of a loss':>30} {'of a statistic':>16}")
for name, curve in curves.items():
    moved = max(
        abs(statistics[name][part] - statistics[reference][part]).max() for part in ("mean", "var")
    )
    print(
        f"{name:<12} {curve[-1]:10.6f} {abs(curve - curves[reference]).max():30.1e} {moved:16.1e}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": (3, 2)})
steps = np.arange(1, STEPS + 1)
looks = (figures.SKY, 9), (figures.ORANGE, 5.5), (figures.GREEN, 2.6), (figures.INK, 1)
for place, (name, (color, width)) in enumerate(zip(curves, looks, strict=True)):
    left.plot(steps, curves[name], color=color, linewidth=width)
    left.text(0.97, 0.93 - 0.08 * place, name, color=color, ha="right", transform=left.transAxes)
    if name != reference:
        difference = 1e7 * (curves[name] - curves[reference])
        right.plot(steps, difference, color=color, linewidth=width / 2 + 0.5)
left.set(xlabel="step", ylabel="training loss", yscale="log")
left.set_title(f"Four training loops, one curve: they differ by {largest:.0e} at most")
right.set(xlabel="step", title="Minus plain optax, in units of 1e-7")
plt.show()

# %% [markdown]
# ## BatchNorm: whose pass counts?
#
# The statistics must move once per step, whatever a variant computes. There are two cases.
#
# - SAM and most variants use your gradient. **Your own pass** moves the statistics: that is what
#   the four loops did.
# - SAMPa, Momentum-SAM, AUSAM, SL-SAM and mSAM do not use your pass. Give them `aux_like`, the
#   statistics themselves or their shapes. Then they keep the aux of their own pass, and
#   `TrainState.apply_gradients` or `keep_aux` puts it into the model. XLA drops your pass, as long
#   as you return the reading `loss` instead of your own value. `linen_step` above does so.
#
# The steps of both Flax frameworks, unchanged, with Momentum-SAM (one gradient per step):


# %%
def momentum_sam(statistics):
    return samx.momentum_sam(make_base(), rho=0.3, aux_like=statistics)


state, model = linen_state(momentum_sam(linen_state(sam).batch_stats)), nnx_model()
tx = momentum_sam(samx.flax.statistics(model))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
for batch in batches[:10]:
    state, value = linen_step(state, batch)
    nnx_step(model, optimizer, batch)
opt_state = nnx.as_pure(optimizer.opt_state)
print("Momentum-SAM       Flax linen    Flax nnx")
for name, pair in {
    "loss, step 10": (value, optax.tree.get(opt_state, "loss")),
    "mean of var": (state.batch_stats["norm"]["var"].mean(), model.norm.var[...].mean()),
    "gradients spent": (
        optax.tree.get(state.opt_state, "gradients_spent"),
        optax.tree.get(opt_state, "gradients_spent"),
    ),
}.items():
    print("{:<16} {:12.6f} {:11.6f}".format(name, *map(float, pair)))

# %% [markdown]
# On several devices each one sees its own examples, and BatchNorm needs
# [one more line](eight_devices.ipynb).
#
# ## Dropout: the same masks in all passes
#
# By default all passes of a step draw the **same** dropout masks: SAM then looks for a bad place of
# the one thinned network of this step. With `masks="fresh"` the passes at perturbed points draw
# other masks. In linen the argument is `state.rngs("dropout", masks="fresh")`; call it inside the
# closure. In nnx it is `samx.flax.closure(..., masks="fresh")`.
#
# A test: with ρ = 0 the perturbed point is `w` itself. With the same masks SAM's step must then be
# the step of plain SGD, to the last bit.


# %%
def moves(tx, masks):
    state = linen_state(tx, dropout=0.5)
    after, _ = linen_step(state, batches[0], masks=masks)
    return jax.tree.map(jnp.subtract, after.params, state.params)


plain = moves(optax.with_extra_args_support(make_base()), "same")
for masks in ("same", "fresh"):
    found = moves(optax.chain(samx.sam(0.0), make_base()), masks)
    difference = optax.tree.norm(optax.tree.sub(found, plain)) / optax.tree.norm(plain)
    print(
        f"{masks + ' masks:':<12} SAM with rho = 0 differs from SGD by {difference:.1%} of a step"
    )

# %% [markdown]
# ## Random streams, modules and metrics outside of the model
#
# Flax's MNIST example calls `model(x, rngs)`: the random stream is not part of the model. Let the
# loss **capture** it, as in `lambda model: loss(model, batch, rngs)`. Every pass starts from what
# the stream holds when you make the closure, and draws the masks of your own pass. Only your own
# pass changes the stream. The same holds for other modules and metrics that the loss captures.


# %%
def outside_loss(model, batch, rngs):
    return cross_entropies(model(batch["x"], rngs), batch).mean()


@nnx.jit
def outside_step(model, optimizer, metrics, rngs, batch):
    value_fn = samx.flax.closure(model, lambda model: outside_loss(model, batch, rngs))
    value, grads = nnx.value_and_grad(outside_loss)(model, batch, rngs)
    metrics.update(loss=value)
    optimizer.update(model, grads, value=value, value_fn=value_fn)


model, rngs = nnx_model(dropout=0.5), nnx.Rngs(dropout=7)
optimizer = nnx.Optimizer(model, sam, wrt=nnx.Param)
metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
for batch in batches[:10]:
    outside_step(model, optimizer, metrics, rngs, batch)
spent = optax.tree.get(nnx.as_pure(optimizer.opt_state), "gradients_spent")
print(
    f"10 steps, {int(spent)} gradients, {int(rngs.dropout.count[...])} draws of masks,"
    f" mean loss {metrics.compute()['loss']:.3f}"
)

# %% [markdown]
# If the closure cannot find an object that the loss changes, for example behind `self.rngs`, it
# raises an error that says how to capture it.
#
# ## Half precision
#
# **bfloat16 compute.** Keep the parameters in float32 and compute in bfloat16, `dtype=jnp.bfloat16`
# in Flax. Nothing else is needed.
#
# **bfloat16 or float16 parameters** work too. A perturbation is small beside the weights: a step of
# radius 0.05 over two million parameters would be rounded away. So the closure gets them in
# float32 at the perturbed point, and its gradient comes back in their dtype. `perturb_dtype=None`
# switches that off; the reading `perturbation_norm` shows what the closure then really sees; `all_readings` asks for it.

# %%
losses = []
for state in (linen_state(sam), linen_state(sam, dtype=jnp.bfloat16)):
    for batch in batches[:50]:
        state, value = linen_step(state, batch)
    losses.append(value)
print("loss after 50 steps: float32 {:.3f}, bfloat16 compute {:.3f}".format(*losses))


# %%
def small_losses(params, batch, dtype=jnp.float32):  # without BatchNorm, for the rest of this page
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, batch["x"]))
    x = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    logits = x @ params["last"]["kernel"] + params["last"]["bias"]
    return cross_entropies(logits.astype(jnp.float32), batch)


start = {name: weights[name] for name in ("first", "last")}
half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start)
for perturb_dtype in ("float32", None):
    tx = samx.all_readings(samx.sam(0.0002, perturb_dtype=perturb_dtype))

    @jax.jit
    def reading(params, tx=tx):
        value_fn = lambda params: small_losses(params, batches[0]).mean()  # noqa: E731
        grads = jax.grad(value_fn)(params)
        _, opt_state = tx.update(grads, tx.init(params), params, value_fn=value_fn)
        return optax.tree.get(opt_state, "perturbation_norm")

    print(f"rho 0.0002, perturb_dtype={perturb_dtype}: the closure saw {reading(half):.6f}")

# %% [markdown]
# **float16 compute** has a small range, so the loss must be scaled, in every pass. `scale_loss`
# scales, unscales, and skips a step as a whole if any of its passes overflows. Then it halves the
# scale; after many good steps it doubles it. Return the loss in float32. `scale_loss` takes the
# gradients itself: pass anything that is shaped like the parameters. Without a scale,
# `samx.skip_nonfinite(tx)` skips broken steps and restores the whole state.

# %%
tx = samx.scale_loss(sam, scale=2.0**30)  # far too large, to show the skipped steps
losses_fn = functools.partial(small_losses, dtype=jnp.float16)
update = jax.jit(functools.partial(tx.update, losses_fn=losses_fn))
params, opt_state, scales = start, tx.init(start), []
for batch in batches[:20]:
    updates, opt_state = update(params, opt_state, params, batch=batch)
    params = optax.apply_updates(params, updates)
    scales.append(int(np.log2(opt_state.loss_scale)))
print(f"log2 of the scale: {scales}")
print(f"gradients spent by the steps that counted: {optax.tree.get(opt_state, 'gradients_spent')}")

# %% [markdown]
# ## Gradient accumulation: two algorithms, and one mistake
#
# A large batch can be processed in microbatches, one after the other. With SAM there are two ways
# to do it, and one that looks right:
#
# ```text
# accumulate        samx.accumulate(optax.chain(sam, base), K)
# micro-batch SAM   optax.chain(sam, optax.MultiSteps(base, K).gradient_transformation())
# the mistake       optax.MultiSteps(optax.chain(sam, base), K)
# ```
#
# | | climbs | descends on | one call gets |
# |---|---|---|---|
# | accumulate | the gradient of the whole batch | the whole batch | the whole batch |
# | micro-batch SAM | each microbatch separately | the mean of the sharp gradients | a microbatch |
# | the mistake | the mean gradient | **the last microbatch alone** | a microbatch |
#
# The first is the exact step of the whole batch, with the activations of one microbatch in memory.
# It splits `batch` for `losses_fn`. The second is another algorithm, with a paper of its own. The
# third also takes a sharp gradient on each microbatch, and throws all but the last away.
#
# `accumulate` takes the gradients itself, like `scale_loss`. The loop below runs all three, with
# batches of 800 images in 8 microbatches, and the whole batch at once.

# %%
LARGE, PARTS, LARGE_STEPS = 800, 8, 60
large_rows = draw.integers(len(images), size=(LARGE_STEPS, LARGE))
microbatch_sam = optax.chain(
    samx.sam(RHO), optax.MultiSteps(make_base(), PARTS).gradient_transformation()
)
methods = {  # the optimizer, and the calls for each large batch
    "whole batch": (sam, 1),
    "accumulate": (samx.accumulate(sam, PARTS), 1),
    "micro-batch SAM": (microbatch_sam, PARTS),
    "the mistake": (optax.MultiSteps(sam, PARTS), PARTS),
}


def train_large(tx, calls):
    """Return the loss of each large batch before its step, and the parameters after it."""

    @jax.jit
    def step(params, opt_state, batch):
        grads = jax.grad(lambda params: small_losses(params, batch).mean())(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, losses_fn=small_losses, batch=batch
        )
        return optax.apply_updates(params, updates), opt_state

    def batch_of(rows):
        return {"x": images[rows], "y": digits[rows]}

    params, opt_state, path, losses = start, tx.init(start), [], []
    for large in large_rows:
        losses.append(mean_loss(params, batch_of(large)))
        for part in range(calls):
            params, opt_state = step(params, opt_state, batch_of(large[part::calls]))
        path.append(params)
    return np.array(losses), path


@jax.jit
def mean_loss(params, batch):
    return small_losses(params, batch).mean()


runs = {name: train_large(*method) for name, method in methods.items()}
_, whole = runs["whole batch"]
distances = {}
print(f"{'':<16} {'last loss':>10} {'distance of the weights':>24}")
for name, (losses, path) in runs.items():
    distances[name] = [
        optax.tree.norm(optax.tree.sub(a, b)) for a, b in zip(path, whole, strict=True)
    ]
    print(f"{name:<16} {losses[-1]:10.6f} {distances[name][-1]:24.1e}")

# %%
figure, (left, right) = plt.subplots(1, 2)
looks = (figures.SKY, 7), (figures.INK, 1.5), (figures.GREEN, 2), (figures.RED, 2)
steps = np.arange(1, LARGE_STEPS + 1)
for place, (name, (color, width)) in enumerate(zip(methods, looks, strict=True)):
    left.plot(steps, runs[name][0], color=color, linewidth=width)
    left.text(0.97, 0.93 - 0.08 * place, name, color=color, ha="right", transform=left.transAxes)
    if name != "whole batch":
        right.plot(steps, distances[name], color=color, label=name)
left.set(xlabel="step", ylabel="loss of the whole batch", yscale="log")
left.set_title("Four losses that look alike")
right.set(xlabel="step", ylabel="distance of the weights", yscale="log")
right.set_title("Only accumulate takes the whole batch's steps")
figures.label_ends(right)
plt.show()

# %% [markdown]
# `accumulate` ends at the same weights as the whole batch, up to rounding. Micro-batch SAM and the
# mistake move away from it within a few steps. Their losses do not give them away on this easy
# task: read the table above, not the loss curve. The mistake spends as many gradients as the
# others, and descends on an eighth of the examples.
#
# - On several devices: `samx.data_parallel(samx.accumulate(tx, K), "data")`, with one all-reduce
#   for all microbatches of a gradient.
# - `samx.msam(rho, K)` is micro-batch SAM in one call.
# - BatchNorm sees one microbatch at a time. `accumulate` takes the clean pass itself: give it
#   `aux_like`, the model's statistics. Its state holds them, a mean over the microbatches, where
#   `samx.flax` finds them.
#
# ## Checkpoints
#
# An optimizer state is a pytree of ordinary arrays. Random keys are kept as their data
# (`jax.random.key_data`). So any checkpointer keeps it: Orbax, `flax.serialization`, pickle. Save
# the parameters, the optimizer state, the statistics, the random key, and the position in the data.
# Then training continues to the last bit as if nothing had happened.
#
# `TrainState` holds all of these but the position in the data, which is `state.step` here.


# %%
def train_on(state, upto):
    while state.step < upto:
        state, _ = linen_step(state, batches[int(state.step)])
    return state


FIRST, LAST = 20, 40
undisturbed = train_on(linen_state(sam), LAST)

saved = train_on(linen_state(sam), FIRST)
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{folder}/step-{FIRST}", saved)
    checkpointer.wait_until_finished()
    from_orbax = checkpointer.restore(f"{folder}/step-{FIRST}", linen_state(sam))
from_flax = flax.serialization.from_bytes(linen_state(sam), flax.serialization.to_bytes(saved))
arrays, structure = jax.tree.flatten(saved)
from_pickle = jax.tree.unflatten(structure, pickle.loads(pickle.dumps(jax.device_get(arrays))))

for name, restored in {"Orbax": from_orbax, "Flax": from_flax, "pickle": from_pickle}.items():
    pairs = map(jax.tree.leaves, (train_on(restored, LAST), undisturbed))
    same = all(bool((a == b).all()) for a, b in zip(*pairs, strict=True))
    print(f"{name:<7} restored at step {int(restored.step)}, step {LAST}: the same bits: {same}")

# %% [markdown]
# `examples/common/checkpoints.py` does this for whole runs, with Orbax and with grain for the
# position in the data. It refuses a checkpoint of another script, variant or shape before it
# changes anything, and names the versions of samx and JAX if they differ. If a checkpoint cannot be
# written, it says in one line what is kept, and training goes on; the next save tries again.
# `examples/train/kills.py` kills training runs at random moments, resumes them, and compares them
# with undisturbed ones.
#
# ## Where to go next
#
# - [Eight devices](eight_devices.ipynb): the same loops on several devices.
# - [Recipes](recipes.md): frozen parameters, LoRA, EMA of the parameters, several learning rates.
# - [Which variant](which_variant.ipynb) and [choosing rho](choosing_rho.ipynb).
# - [The contract](contract.md): every keyword of `update`, and what samx promises.
