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
# # Eight devices: jit, shard_map and pmap
#
# After this page you can run any variant of samx on several devices, in each of JAX's three ways,
# and know that it takes the step of one device. You know what *m-sharpness* is, and how to turn it
# on. You can give SAMPa's two gradients to two groups of devices, and keep BatchNorm's statistics
# equal on all devices. It runs in about a minute.
#
# You need no accelerator: JAX simulates eight devices on one processor. These must be the first
# lines of a program, before anything touches a device.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)

# %%
import functools

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import samx
import samx.flax
from examples.common import figures

figures.use_style()
STEPS, BATCH, WIDTH, RHO, LEARNING_RATE = 100, 96, 64, 0.1, 0.1
devices = jax.devices("cpu")[:8]
print(f"{len(devices)} devices: {devices[0]}, ..., {devices[-1]}")

# %% [markdown]
# ## One network, one step
#
# A small network learns scikit-learn's digits. `make_step` builds the training step. Every strategy
# below uses it: what differs is the optimizer `tx`, and who takes the mean of the gradient.

# %%
images, digits = load_digits(return_X_y=True)
images, digits = np.asarray(images / 16, np.float32), np.asarray(digits, np.int32)
draw = np.random.default_rng(0)
rows = draw.integers(len(images), size=(STEPS, BATCH))
batches = [{"x": images[row], "y": digits[row]} for row in rows]


def dense(inputs, outputs):
    kernel = draw.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return {"kernel": np.float32(kernel), "bias": np.zeros(outputs, np.float32)}


weights = {"first": dense(64, WIDTH), "last": dense(WIDTH, 10)}


def losses_fn(params, batch):  # one loss per example, [B]
    x = jax.nn.relu(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    logits = x @ params["last"]["kernel"] + params["last"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def make_step(tx, value_and_grad):
    def step(params, opt_state, batch):
        def value_fn(params):
            return losses_fn(params, batch).mean()

        value, grads = value_and_grad(value_fn)(params)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            value=value,
            value_fn=value_fn,
            losses_fn=losses_fn,
            batch=batch,
        )
        return optax.apply_updates(params, updates), opt_state, optax.tree.get(opt_state, "loss")

    return step


def train(step, params, opt_state, place):
    """Return the loss of each step, and the parameters at the end."""
    losses = []
    for batch in batches:
        params, opt_state, value = step(params, opt_state, place(batch))
        losses.append(np.asarray(value).flat[0])  # pmap returns one value per device
    return np.array(losses), params


base = optax.sgd(LEARNING_RATE, momentum=0.9)
sam = optax.chain(samx.sam(RHO), base)
curves = {}
step = jax.jit(make_step(sam, jax.value_and_grad))
curves["one device"], alone = train(step, weights, sam.init(weights), jax.device_put)

# %% [markdown]
# ## jit: nothing to do
#
# Lay out the batch over the devices, and call the same compiled step. Every mean in the program is
# the mean over the whole batch, wherever its examples are. So samx has nothing to add. The same
# holds for sharded parameters (FSDP, tensor parallelism), on Auto and on Explicit meshes.
#
# `samx.state_specs` gives the `PartitionSpec` of each leaf of an optimizer state: use it to lay out
# a compiled `init`, or for the `in_specs` of `shard_map` below.

# %%
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shard(batch):
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


def everywhere(tree):
    return jax.device_put(tree, NamedSharding(mesh, P()))


start = everywhere(weights)
curves["jit"], _ = train(step, start, everywhere(sam.init(weights)), shard)

# %% [markdown]
# ## shard_map: one line
#
# Inside `jax.shard_map` each device sees its own examples. `samx.data_parallel(tx, "data")` says
# along which axis they are spread. Every gradient inside becomes a mean over the devices.
#
# Your own gradient needs `samx.value_and_grad(value_fn, "data")`. With `check_vma`, `jax.grad` of a
# local loss arrives **summed** over the devices, and its type does not show it. `data_parallel`
# does not use your gradient: it computes gradient and loss from the closure, and the compiler
# merges yours with them or drops it.

# %%
parallel = samx.data_parallel(sam, "data")
specs = samx.state_specs(parallel, weights, batch_specs=P("data"))
mean_value_and_grad = functools.partial(samx.value_and_grad, axis_name="data")


def on_shards(tx, specs):
    return jax.jit(
        jax.shard_map(
            make_step(tx, mean_value_and_grad),
            mesh=mesh,
            in_specs=(P(), specs, P("data")),
            out_specs=(P(), specs, P()),
        )
    )


by_shard_map = on_shards(parallel, specs)
curves["shard_map"], _ = train(by_shard_map, start, everywhere(parallel.init(weights)), shard)

# %% [markdown]
# ## pmap: the same line
#
# `jax.pmap` wants a leading axis of devices on every argument. JAX keeps it for old code; today it
# is `jit` and `shard_map` inside.


# %%
def copies(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), tree)


def split(batch):
    return {name: leaf.reshape(8, -1, *leaf.shape[1:]) for name, leaf in batch.items()}


by_pmap = jax.pmap(make_step(parallel, mean_value_and_grad), axis_name="data", devices=devices)
curves["pmap"], _ = train(by_pmap, copies(weights), copies(parallel.init(weights)), split)

# %%
reference, *others = curves
differences = {name: curves[name] - curves[reference] for name in others}
largest = max(abs(difference).max() for difference in differences.values())
for name, difference in differences.items():
    print(f"{name:<10} largest difference from one device: {abs(difference).max():.1e}")

figure, (above, below) = plt.subplots(
    2, 1, figsize=(9.5, 5.6), sharex=True, gridspec_kw={"height_ratios": (3, 2)}
)
looks = (figures.GREY, 9), (figures.SKY, 5.5), (figures.ORANGE, 2.8), (figures.INK, 1)
for place, (name, (color, width)) in enumerate(zip(curves, looks, strict=True)):
    above.plot(np.arange(1, STEPS + 1), curves[name], color=color, linewidth=width)
    above.text(0.98, 0.9 - 0.1 * place, name, color=color, ha="right", transform=above.transAxes)
    if name != reference:
        steps = np.arange(1, STEPS + 1)
        below.plot(steps, 1e7 * differences[name], color=color, linewidth=width / 2 + 0.4)
above.set(ylabel="training loss", yscale="log")
above.set_title(f"SAM on eight devices: three strategies, one curve, within {largest:.0e}")
below.set(xlabel="step", ylabel="difference, 1e-7")
below.set_title("Minus one device, in units of 1e-7: rounding of float32")
plt.show()

# %% [markdown]
# This is tested for every variant on eight simulated devices, in float64: all three agree with one
# device on the whole batch to 1e-12 after one step and to 1e-10 after twenty, state included.
#
# Two rules for the mapped functions:
#
# - Parameters and state must be the same on all mapped devices. For sharded parameters use `jit`,
#   or leave their axis to the compiler: `jax.shard_map(..., axis_names={"data"})`.
# - **Ragged batches**: pass `weights`, 0 for padding, to `update` and to `samx.value_and_grad`. A
#   device then counts by the sum of its weights, and one without examples does not count at all.
#
# The second rule, with a batch of 50 images that is padded to 96. The last devices hold nothing but
# padding.


# %%
def weighted_step(params, opt_state, batch, weights):
    def value_fn(params):
        losses = losses_fn(params, batch)
        return jnp.sum(weights * losses) / jnp.maximum(weights.sum(), 1)

    _, grads = samx.value_and_grad(value_fn, "data", weights=weights)(params)
    updates, opt_state = parallel.update(
        grads, opt_state, params, value_fn=value_fn, weights=weights
    )
    return optax.apply_updates(params, updates), opt_state


ragged = jax.jit(
    jax.shard_map(
        weighted_step,
        mesh=mesh,
        in_specs=(P(), specs, P("data"), P("data")),
        out_specs=(P(), specs),
    )
)
is_real = np.float32(np.arange(BATCH) < 50)
found, _ = ragged(start, parallel.init(weights), shard(batches[0]), shard(is_real))
fifty = jax.tree.map(lambda leaf: leaf[:50], batches[0])
expected, _, _ = step(weights, sam.init(weights), fifty)
worst = max(jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), found, expected)))
print(f"50 images on 8 devices, minus 50 images on one device: {worst:.1e}")

# %% [markdown]
# ## m-sharpness: each device climbs its own gradient
#
# `data_parallel(tx, axis)` climbs the gradient of the whole batch: `ascent="global"`. With
# `ascent="local"` each device climbs the gradient of its own examples, and the sharp gradients are
# averaged. This is *m-sharpness*, and what the SAM paper ran on many devices. It changes two
# things.
#
# **It sends half as much.** A global step reduces two gradients over all devices, a local step one.
# The compiler's program shows it:

# %%
from examples.common.programs import communicated_bytes

local = samx.data_parallel(sam, "data", ascent="local")
by_local = on_shards(local, specs)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
for name, program in {"global": by_shard_map, "local": by_local}.items():
    compiled = program.lower(start, parallel.init(weights), shard(batches[0])).compile()
    sent = communicated_bytes(compiled)["all-reduce"]
    print(
        f"{name:<7} {sent:6} bytes all-reduced per step = {sent / size:.2f} copies of the weights"
    )

# %% [markdown]
# **It is another algorithm**, and the number of devices becomes a hyperparameter. The step of 8
# devices with local ascent is micro-batch SAM with 8 microbatches, `samx.msam(rho, 8)`. On one
# device that is the easy way to try it out.


# %%
def rows_of_devices(batch):
    """Reorder a batch: device j gets the examples j, j + 8, ..., which are microbatch j of msam."""
    return {name: np.concatenate([leaf[j::8] for j in range(8)]) for name, leaf in batch.items()}


msam = optax.chain(samx.msam(RHO, 8), base)
with_msam = jax.jit(make_step(msam, jax.value_and_grad))
ordered = shard(rows_of_devices(batches[0]))
by_devices, _, _ = by_local(start, local.init(weights), ordered)
by_msam, _, _ = with_msam(weights, msam.init(weights), batches[0])
by_global, _, _ = by_shard_map(start, parallel.init(weights), ordered)


def distance(params, other):
    return float(optax.tree.norm(jax.tree.map(lambda a, b: np.asarray(a) - b, params, other)))


print(f"one step, local ascent minus msam with 8 microbatches: {distance(by_devices, by_msam):.1e}")
print(
    f"one step, local ascent minus global ascent:            {distance(by_devices, by_global):.1e}"
)

# %% [markdown]
# What does it do to the accuracy? Digits with 30 % wrong training labels, batches of 96 images, and
# the ascent of 1, 2 and 8 devices over a grid of radii.

# %%
from examples.common import digits_task

SEEDS, EPOCHS, NOISE = 8, 20, 0.3
RADII = jnp.array([0.05, 0.1, 0.2, 0.3, 0.4])


def accuracy_of(num_devices, rho, key, train_set, test_set):
    steps = EPOCHS * 10
    tx = optax.chain(
        samx.msam(rho, num_devices, how="vmap"),
        optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), momentum=0.9),
    )

    def step(carry, key):
        params, opt_state = carry
        rows = jax.random.choice(key, len(train_set["x"]), (BATCH,), replace=False)
        batch = {name: train_set[name][rows] for name in ("x", "y")}
        updates, opt_state = tx.update(params, opt_state, params, losses_fn=losses_fn, batch=batch)
        return (optax.apply_updates(params, updates), opt_state), None

    params = jax.tree.map(jnp.asarray, weights)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))
    x = jax.nn.relu(test_set["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    logits = x @ params["last"]["kernel"] + params["last"]["bias"]
    return (logits.argmax(-1) == test_set["y"]).mean()


seeds = jnp.arange(SEEDS)
train_sets, _, test_sets = digits_task.split(seeds, NOISE)
keys = jax.vmap(jax.random.key)(seeds)
accuracies = {}
for num_devices in (1, 2, 8):
    run = functools.partial(accuracy_of, num_devices)
    over_seeds = jax.vmap(run, in_axes=(None, 0, 0, 0))
    over_radii = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None)))
    found = over_radii(RADII, keys, train_sets, test_sets)
    accuracies[num_devices] = 100 * np.asarray(found, np.float64)

print("test accuracy, %   rho:" + "".join(f"{rho:>14.2f}" for rho in RADII))
for num_devices, found in accuracies.items():
    errors = found.std(axis=1, ddof=1) / np.sqrt(SEEDS)
    cells = "".join(f"{m:>8.1f} ± {e:.1f}" for m, e in zip(found.mean(axis=1), errors, strict=True))
    print(f"{num_devices} device(s), local ascent {cells}")
paired = accuracies[8] - accuracies[1]
errors = paired.std(axis=1, ddof=1) / np.sqrt(SEEDS)
cells = "".join(f"{m:>+8.1f} ± {e:.1f}" for m, e in zip(paired.mean(axis=1), errors, strict=True))
print(f"8 minus 1, seed by seed   {cells}")

# %% [markdown]
# At radii up to 0.2 the three are level: the differences are within their errors. At larger radii
# the ascent of 8 devices fails first. At ρ = 0.3 it is more than a point behind, and at ρ = 0.4 it
# no longer trains, where one device still does. A likely reason: each perturbation climbs the loss
# of the very 12 images on which the sharp gradient is taken next, so the same radius disturbs them
# more. When the number of devices changes, **choose ρ again**, and try smaller values. The mSAM
# paper reports that a small m generalizes better; on this task we see no gain.
#
# More about local ascent:
#
# - Only the direction of the perturbation is the device's own. All state and every decision come
#   from the mean gradient, so state stays equal on all devices.
# - `sampa` and `async_sam` climb the gradient of their last step, and `momentum_sam` its momentum.
#   These are means already: for them local is global.
# - With several axes, `ascent=("inner",)` lets the devices along "inner" climb together, and the
#   groups on their own.
# - `data_parallel(sam, axis, ascent="local")` sends one gradient per step. `msam` inside
#   `data_parallel` averages the gradients of each microbatch over the devices on its own.
#
# ## SAMPa on two groups of devices
#
# SAMPa's two gradients do not wait for each other. Give each to one group of devices: then a step
# is one gradient per device instead of two in a row. Here under `jit`, on a mesh of two groups of
# four; inside `shard_map` add `data_parallel(tx, "data")` as above. `pmap` has a single axis: there
# the two groups are two devices.

# %%
PAIR_STEPS = 20
pair_mesh = jax.make_mesh(
    (2, 4), ("pair", "data"), axis_types=(AxisType.Auto,) * 2, devices=devices
)
one_device = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:1])
sampa_curves = {}
for name in ("one device", "two groups"):
    groups = {"pair_sharding": P("pair")} if name == "two groups" else {}
    tx = samx.sampa(base, RHO, batch_like=batches[0], **groups)
    step = jax.jit(make_step(tx, jax.value_and_grad))
    with jax.set_mesh(pair_mesh if groups else one_device):
        params, opt_state, losses = weights, tx.init(weights), []
        for batch in batches[:PAIR_STEPS]:
            spread = jax.device_put(batch, P("data"))
            params, opt_state, value = step(params, opt_state, spread)
            losses.append(float(value))
    sampa_curves[name] = np.array(losses)
worst = abs(sampa_curves["one device"] - sampa_curves["two groups"]).max()
print(f"SAMPa, {PAIR_STEPS} steps: two groups minus one device: {worst:.1e}")

# %% [markdown]
# When is that faster than data-parallel SAM on the same devices? Flops and bytes are the same. SAM
# takes two gradients of a share of the batch, one after the other; SAMPa on two groups one gradient
# of twice the share. It wins where a share does not fill a device. [Devices](devices.md) has the
# table and measurements.
#
# ## BatchNorm: one more line
#
# In `shard_map` and `pmap` each device normalizes by its own examples, so its BatchNorm statistics
# are its own too. `samx.axis_mean` gives all devices their mean. Here with Flax nnx, and SAMPa,
# which keeps the statistics of its own pass.


# %%
class Model(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(64, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def model_losses(model, batch):  # one loss per example, [B]
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])


def make_nnx_step(is_averaged):
    def train_step(model, optimizer, batch):
        losses_fn = samx.flax.closure(model, model_losses)
        value, grads = nnx.value_and_grad(lambda m: model_losses(m, batch).mean())(model)
        if is_averaged:
            nnx.update(model, samx.axis_mean(samx.flax.statistics(model), "data"))  # the line
        optimizer.update(model, grads, value=value, losses_fn=losses_fn, batch=batch)
        samx.flax.keep_aux(model, optimizer)
        return samx.axis_mean(value, "data")

    held = nnx.StateSharding({nnx.PathContains("previous"): P("data"), ...: P()})
    in_specs = (P(), held, P("data"))
    return nnx.jit(nnx.shard_map(train_step, mesh=mesh, in_specs=in_specs, out_specs=P()))


def make_model(tx_of):
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, samx.data_parallel(tx_of(model), "data"), wrt=nnx.Param)


def with_sampa(model):
    return samx.sampa(base, batch_like=batches[0], aux_like=samx.flax.statistics(model))


def with_sam(_):
    return sam


for name, tx_of in {"SAM": with_sam, "SAMPa": with_sampa}.items():
    model, optimizer = make_model(tx_of)
    train_step = make_nnx_step(is_averaged=True)
    losses = [float(train_step(model, optimizer, shard(batch))) for batch in batches[:10]]
    parts = [np.asarray(part.data) for part in model.norm.mean[...].addressable_shards]
    same = len(parts) == 8 and all((part == parts[0]).all() for part in parts)
    print(
        f"{name:<6} loss {losses[0]:.3f} -> {losses[-1]:.3f}; statistics equal everywhere: {same}"
    )

try:
    make_nnx_step(is_averaged=False)(*make_model(with_sam), shard(batches[0]))
except Exception as error:
    print(f"without the line: {type(error).__name__}: {str(error)[:100]}...")

# %% [markdown]
# - **Without that line** JAX reports that `out_specs` cannot be inferred. Do not follow its advice,
#   `check_vma=False`: it only hides that every device keeps other statistics.
# - **`StateSharding`** shards the examples that SAMPa holds for its next step, `previous`. For
#   other variants `P()` is enough.
# - `jax.shard_map` and `jax.pmap` take the same step between `nnx.merge` and `nnx.split`.
# - **Synchronized layers**, `BatchNorm(axis_name="data")`, equal one device on the whole batch.
#   Without them the statistics are the mean of the devices' own.
# - **Linen**: average what your own pass returns,
#   `batch_stats=samx.axis_mean(batch_stats, "data")`.
# - **Dropout masks** are the same on all devices, unless the keys in the model differ.
#
# ## Several processes and hosts
#
# Call `jax.distributed.initialize`; then write the same. `examples/devices/data_parallel.py` trains
# the digits under each strategy, with every variant. `examples/devices/multi_process.py` starts two
# processes on this machine and trains the same network to the same parameters.
#
# ## Where to go next
#
# - [Devices](devices.md): what each device computes, sends and holds, for every variant; measured
#   and by formula.
# - [Asynchronous training](workers_that_do_not_wait.ipynb): for devices that cannot keep pace.
# - [Training loops](training_loops.ipynb): accumulation inside `data_parallel`, half precision,
#   checkpoints.
