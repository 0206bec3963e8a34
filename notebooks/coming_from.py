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
# # Coming from another SAM
#
# You train with `davda54/sam`, `pytorch_optimizer`, `optax.contrib.sam` or the GSAM of
# `big_vision`. After this page you can write the same step with samx, you know which argument
# becomes which, and you have seen that the numbers are equal. The first section takes two minutes
# to read. The page runs in less than a minute.
#
# | you write | with samx |
# |---|---|
# | `SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)` | `optax.chain(samx.sam(0.05), optax.sgd(0.1, momentum=0.9))` |
# | the same with `adaptive=True` | `samx.asam(0.05, eta=0.0, is_scaled=lambda path, leaf: True)` in place of `samx.sam(0.05)` |
# | `optax.contrib.sam(base, optax.chain(normalize(), optax.sgd(0.05)))` | `optax.chain(samx.sam(0.05), base)` |
# | `gsam_gradient(..., rho_max, rho_min, alpha, lr, lr_max, lr_min)` | `samx.gsam(samx.schedules.following(...), alpha)` |
# | `GSAM`, `WSAM`, `LookSAM`, `FriendlySAM` of `pytorch_optimizer` | `samx.gsam`, `samx.wsam`, `samx.looksam`, `samx.friendly_sam` |
#
# ## The loop, side by side
#
# In PyTorch you call the model twice in each iteration. `first_step` moves the weights up the
# gradient, and `second_step` moves them back and lets the base optimizer step:
#
# ```python
# optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
#
# for inputs, targets in loader:
#     loss = loss_fn(model(inputs), targets)
#     loss.backward()
#     optimizer.first_step(zero_grad=True)
#
#     loss_fn(model(inputs), targets).backward()
#     optimizer.second_step(zero_grad=True)
# ```
#
# In JAX the loss is a function of the parameters. You hand it over, and one call of `update` takes
# both gradients. The weights never leave their place. Everything else is an ordinary optax step:

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import examples
import samx
from examples.common import figures


# %%
def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["W1"] + params["b1"])
    logits = hidden @ params["W2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def make_step(tx):
    def step(params, state, batch):
        def value_fn(params):
            return loss_fn(params, batch)

        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, value

    return step


tx = optax.chain(samx.sam(rho=0.05), optax.sgd(0.1))
step = jax.jit(make_step(tx))  # then: params, state, value = step(params, state, batch)

# %% [markdown]
# What you no longer need:
#
# | in the PyTorch loop | here |
# |---|---|
# | `zero_grad=True`, `first_step`, `second_step`, `step(closure)` | one `tx.update(..., value_fn=value_fn)` |
# | `enable_running_stats`, `disable_running_stats` around the two passes | nothing: the second pass cannot change BatchNorm's statistics, which come from your own forward pass ([training loops](training_loops.ipynb)) |
# | a learning rate scheduler on `optimizer.base_optimizer` | an optax schedule in the base; `rho` takes one too |
# | `clip_grad_norm_` before `second_step` | `optax.clip_by_global_norm(1.0)` after `samx.sam` in the chain |
# | `with model.no_sync():` around the first pass | `samx.data_parallel(tx, "data", ascent="local")` inside `shard_map`: each device climbs its own gradient, m-sharpness ([eight devices](eight_devices.ipynb)). Under plain `jit` with a sharded batch, SAM climbs the gradient of the whole batch |
# | `GradScaler` | nothing in bfloat16; `samx.scale_loss(tx)` in float16 |
# | several backward passes before a step | `samx.accumulate(tx, K)` |
# | `optimizer.state_dict()` | `state` is a pytree of arrays, which every checkpointer keeps |
#
# ## How equal is equal?
#
# This page has no PyTorch. Instead, the repository holds **recorded runs** of the other codes:
# twelve steps in float64 on a tiny network, with the parameters after every step. Each file says
# which code ran, and how. Here are the same data and the same initial parameters, and a function
# that trains with samx on the same batches.

# %%
STEPS, BATCH = 12, 16
FOLDER = Path(examples.__file__).parents[1] / "tests" / "support" / "trajectories"

rng = np.random.RandomState(0)
x = rng.randn(64, 10)
y = np.argmax(x @ rng.randn(10, 3) + 0.5 * rng.randn(64, 3), axis=1)
start = {
    "W1": 0.5 * rng.randn(10, 16),
    "b1": 0.1 * rng.randn(16),
    "W2": 0.5 * rng.randn(16, 3),
    "b2": 0.1 * rng.randn(3),
}
data = {"x": x, "y": y}
batches = {  # step t takes batch t % 4
    name: leaf.reshape(-1, BATCH, *leaf.shape[1:])[np.arange(STEPS) % 4]
    for name, leaf in data.items()
}


def train(tx):
    """The parameters after every step: one array [steps, ...] for each name."""
    with jax.enable_x64(True):  # the recorded runs are in float64

        def step(carry, batch):
            params, state, _ = make_step(tx)(*carry, batch)
            return (params, state), params

        def run(params, batches):
            return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

        return jax.device_get(jax.jit(run)(start, batches))


def recorded(name):
    """A recorded run, and where it comes from."""
    with np.load(FOLDER / f"{name}.npz") as file:
        source = json.loads(str(file["meta"]))["source"]
        return {key: file[key][:STEPS] for key in start}, source


def difference(ours, theirs):
    """The largest difference of any parameter, after every step."""
    apart = [np.abs(ours[name] - theirs[name]).reshape(STEPS, -1).max(axis=1) for name in start]
    return np.max(apart, axis=0)


# %% [markdown]
# ## davda54/sam
#
# Three recorded runs of its `SAM` class, unmodified, over three base optimizers:

# %%
momentum = optax.sgd(0.1, momentum=0.9)
pairs = {}  # name -> (ours, theirs)


def compare(name, tx, file):
    """Train with samx, and print the largest difference from the recorded run."""
    theirs, source = recorded(file)
    pairs[name] = train(tx), theirs
    largest = difference(*pairs[name]).max()
    print(f"{name:<24} {largest:.0e}   {source.split(':')[0]}")
    assert largest < 1e-10


adamw = optax.adamw(0.01, weight_decay=0.01)
compare("SAM, SGD", optax.chain(samx.sam(0.05), optax.sgd(0.1)), "sam__sgd_rho0.05")
compare("SAM, momentum", optax.chain(samx.sam(0.5), momentum), "sam__sgdm_rho0.5")
compare("SAM, AdamW", optax.chain(samx.sam(0.05), adamw), "sam__adamw_rho0.05")

# %% [markdown]
# What is left is a number that its class adds to the norm of the gradient, 1e-12. samx adds none.
# With that number as well, only rounding is left:


# %%
def climb_like_davda54(g, _, rho):
    return optax.tree.scale(rho / (optax.tree.norm(g) + 1e-12), g)


with_epsilon = samx.sam(perturbation=samx.perturbations.ball(0.5, climb_like_davda54))
compare("SAM, momentum, 1e-12", optax.chain(with_epsilon, momentum), "sam__sgdm_rho0.5")

# %% [markdown]
# Its arguments:
#
# | davda54/sam | samx | what to know |
# |---|---|---|
# | `params` | `tx.init(params)` | frozen parameters: `samx.freeze`; perturb some only: `samx.perturbations.on_leaves` |
# | `base_optimizer`, `**kwargs` | what comes after `samx.sam` in the chain | |
# | `rho=0.05` | `rho=0.05` | one norm over all parameters, in both |
# | `adaptive=True` | `samx.asam(rho, eta=0.0, is_scaled=lambda path, leaf: True)` | see below |
# | `1e-12`, fixed, added to the norm | no such number | a zero gradient gives a zero perturbation |
# | `SGD(weight_decay=5e-4)` | `optax.add_decayed_weights(5e-4)` between `samx.sam` and `optax.sgd` | decay at $w$, and not part of the ascent, in both |
# | `Adam(weight_decay=...)` | `optax.add_decayed_weights(...)` between `samx.sam` and `optax.adam` | |
# | `AdamW` | `optax.adamw(..., weight_decay=0.01)` | PyTorch's default decay is 0.01, optax's is 0.0001: write it down |
#
# The same class is in `pytorch_optimizer`, where `perturb_eps` is the number that is added.
#
# ### Three things called adaptive
#
# ASAM measures a perturbation relative to the size of each weight. In `davda54/sam` that concerns
# all parameters. In the authors' own code, and by default in samx, biases are left out and a small
# $\eta$ is added to $|w|$. In `big_vision` the step is scaled by $|w|$ but the norm is not, which
# is a third geometry. Only the second has a recorded run; for the other two, here are their lines
# in numpy.

# %%
gradient = jax.jit(jax.grad(loss_fn))


def by_hand(direction_at):
    """SGD with momentum; `direction_at(t, w, grad)` is what the base optimizer gets."""
    w, buffer, path = start, dict.fromkeys(start, 0.0), []
    with jax.enable_x64(True):
        for t in range(STEPS):
            batch = {name: leaf[t] for name, leaf in batches.items()}
            direction = direction_at(t, w, lambda w, b=batch: jax.device_get(gradient(w, b)))
            buffer = {k: 0.9 * buffer[k] + direction[k] for k in w}
            w = {k: w[k] - 0.1 * buffer[k] for k in w}
            path.append(w)
    return {k: np.stack([w[k] for w in path]) for k in start}


def norm(tree):
    return np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))


def davda54_adaptive(_, w, grad, rho=2.0):
    g = grad(w)
    scale = rho / (norm({k: np.abs(w[k]) * g[k] for k in w}) + 1e-12)
    return grad({k: w[k] + w[k] ** 2 * g[k] * scale for k in w})


def big_vision_adaptive(_, w, grad, rho=1.0):
    g = grad(w)
    scale = rho / (norm(g) + 1e-12)
    return grad({k: w[k] + np.abs(w[k]) * g[k] * scale for k in w})


# %%
def is_any(*_):  # (path, leaf)
    return True


def climb(g, w, rho):
    scale = rho / (optax.tree.norm(g) + 1e-30)
    return jax.tree.map(lambda g, w: scale * jnp.abs(w) * g, g, w)


like_davda54 = optax.chain(samx.asam(2.0, eta=0.0, is_scaled=is_any), momentum)
like_big_vision = optax.chain(samx.sam(perturbation=samx.perturbations.ball(1.0, climb)), momentum)

compare("ASAM of its authors", optax.chain(samx.asam(0.5), momentum), "asam__sgdm_rho0.5_eta0.01")
for name, tx, lines in (
    ("adaptive, davda54/sam", like_davda54, davda54_adaptive),
    ("adaptive, big_vision", like_big_vision, big_vision_adaptive),
):
    print(f"{name:<24} {difference(train(tx), by_hand(lines)).max():.0e}   its lines in numpy")
apart = difference(train(optax.chain(samx.asam(2.0), momentum)), by_hand(davda54_adaptive)).max()
print(f"\nsamx.asam(2.0) with its defaults, from adaptive=True with rho=2.0: {apart:.1g}")

# %% [markdown]
# The last line is the one to remember: a radius that was chosen for `adaptive=True` is not a radius
# for ASAM with its defaults. There, biases move further.
#
# ## optax.contrib.sam
#
# ```python
# adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
# tx = optax.contrib.sam(base, adversary, sync_period=2)                     # transparent mode
# tx = optax.contrib.sam(base, adversary, sync_period=2, opaque_mode=True)
# ```
#
# In its default, *transparent* mode one call of `update` takes one gradient. With `sync_period=2`
# the first call climbs and the second descends, so an optimizer step takes two iterations of your
# loop. You have to feed each batch twice, counters and epochs run at double speed, and in between
# your `params` are the perturbed ones. In `opaque_mode` one call is one step, as in samx, and you
# pass the gradient as a function. Both give SAM's numbers:

# %%
adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))


def train_contrib(sync_period, opaque_mode):
    """The parameters after every step of optax.contrib.sam."""
    tx = optax.contrib.sam(momentum, adversary, sync_period, opaque_mode=opaque_mode)
    calls = 1 if opaque_mode else sync_period  # for one step of the base optimizer
    with jax.enable_x64(True):

        def step(carry, batch):
            params, state = carry

            def grad_fn(params, _=None):
                return jax.grad(loss_fn)(params, batch)

            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        def run(params, batches):
            return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

        fed = {name: np.repeat(leaf, calls, axis=0) for name, leaf in batches.items()}
        path = jax.device_get(jax.jit(run)(start, fed))
    return {name: leaf[calls - 1 :: calls] for name, leaf in path.items()}


ball = samx.perturbations.metric_ball(0.1)
one, two = (optax.chain(samx.sharpness_aware(ball, n), momentum) for n in (1, 2))
pairs["optax.contrib.sam"] = train(one), train_contrib(2, opaque_mode=True)
for name, pair in {
    "opaque, sync_period=2": pairs["optax.contrib.sam"],
    "transparent, the same": (pairs["optax.contrib.sam"][0], train_contrib(2, opaque_mode=False)),
    "opaque, sync_period=3": (train(two), train_contrib(3, opaque_mode=True)),
}.items():
    print(f"{name:<24} {difference(*pair).max():.0e}")

# %% [markdown]
# | optax.contrib.sam | samx | what to know |
# |---|---|---|
# | `optimizer` | what comes after in the chain | |
# | `adv_optimizer=optax.chain(normalize(), optax.sgd(rho))` | `rho` | another geometry: `perturbation=`, any optax transformation from a gradient to a step *up* |
# | `sync_period=2` | `samx.sam(rho)` | |
# | `sync_period=n + 1` | `samx.sharpness_aware(samx.perturbations.metric_ball(rho), ascent_steps=n)` | $n$ steps of the full radius, in both |
# | `opaque_mode=True`, `grad_fn=` | `value_fn=`, always one step per call | samx takes the loss, not its gradient; so it can report both losses |
# | `batch_axis_name="data"` | `samx.data_parallel(tx, "data")` | |
# | `reset_state` | no such argument | the radius' schedule runs on the optimizer's steps |
#
# Two things that change when you come here. A gradient of zero is not a division by zero, and a
# schedule of the radius is followed:

# %%
w, zero = jnp.array([3.0, 4.0]), jnp.zeros(2)
radius = optax.linear_schedule(0.4, 0.1, 3)
shrinking = optax.chain(optax.contrib.normalize(), optax.sgd(radius))
theirs = optax.contrib.sam(optax.sgd(0.0), shrinking, opaque_mode=True)
ours = samx.all_readings(optax.chain(samx.sam(radius), optax.sgd(0.0)))
seen = []


def watch(point, _=None):
    """The gradient of ‖w‖² / 2; notes how far from w it was asked for."""
    seen.append(f"{float(jnp.linalg.norm(point - w)):.1f}")
    return point


state = theirs.init(w)
for _ in range(4):
    _, state = theirs.update(w, state, w, grad_fn=watch)
print("radius at steps 0 to 3, optax.contrib.sam:", *seen)

state, seen = ours.init(w), []
for _ in range(4):
    _, state = ours.update(w, state, w, value_fn=lambda w: w @ w / 2)
    seen.append(f"{float(optax.tree.get(state, 'perturbation_norm')):.1f}")
print("radius at steps 0 to 3, samx:             ", *seen)

to_zero, _ = theirs.update(zero, theirs.init(w), w, grad_fn=lambda w, _: w)
print("update at a zero gradient, optax.contrib.sam:", to_zero)
to_zero, _ = ours.update(zero, ours.init(w), w, value_fn=lambda w: w @ w / 2)
print("update at a zero gradient, samx:             ", to_zero)

# %% [markdown]
# ## GSAM of big_vision
#
# ```python
# l, grads = gsam_gradient(
#     loss_fn, params, inputs, targets,
#     rho_max=0.2, rho_min=0.02, alpha=0.4, lr=lr, lr_max=0.1, lr_min=0.001)
# grads = jax.lax.pmean(grads, axis_name="batch")
# updates, opt = tx.update(grads, opt, params)
# ```
#
# Its radius follows the learning rate, so the function wants the current learning rate in absolute
# value. In samx both are schedules:


# %%
def learning_rate(step):
    return 0.1 + (0.001 - 0.1) * jnp.asarray(step, float) / 12


rho = samx.schedules.following(learning_rate, 0.2, 0.02, peak_value=0.1, end_value=0.001)
falling = optax.chain(samx.gsam(rho, alpha=0.4), optax.sgd(learning_rate, momentum=0.9))
constant = optax.chain(samx.gsam(0.1, alpha=0.4), momentum)
compare("GSAM, falling radius", falling, "gsam__sgdm_alpha0.4_linearlr")
compare("GSAM, constant radius", constant, "gsam__sgdm_alpha0.4_rho0.1")

# %% [markdown]
# | gsam_gradient | samx | what to know |
# |---|---|---|
# | `loss_fn`, `params`, `inputs`, `targets` | `value_fn` of `update` | |
# | `rho_max`, `rho_min`, `lr`, `lr_max`, `lr_min` | `samx.schedules.following(lr, rho_max, rho_min, peak_value=lr_max, end_value=lr_min)` as `rho` | in a warm-up from below `lr_min` their radius can become negative; here it stops at 0 |
# | `lr_max == lr_min` | `rho` is a number | |
# | `alpha` | `alpha` | |
# | `eps=1e-12` | no such number | |
# | `adaptive_perturbation=True` | `perturbation=ball(rho, climb)`, the `climb` above | not ASAM |
# | `minimize_fp=False` | `descend="clean"` | |
# | `jax.lax.pmean` of the result | `samx.data_parallel(tx, "data", ascent="local")` | each device climbs its own gradient, in both; samx decomposes the means, their code decomposes on each device |
# | `l_clean`, returned | the `value` that you computed | |
#
# Clipping, Adam's scaling and weight decay come after `samx.gsam` in the chain, in their order.
#
# ## pytorch_optimizer
#
# It has the largest choice in PyTorch, with the two steps of `davda54/sam`. Where a class follows
# its authors' code, samx and the authors agree, and your numbers stay the same. The recorded runs
# are those of the authors; LookSAM has no published code, and the run is of the authors of
# Momentum-SAM.

# %%
compare("WSAM", samx.wsam(momentum, 0.1, rho=0.05, gamma=0.9), "wsam__sgdm_rho0.05_gamma0.9")
coupled = optax.chain(samx.coupled_wsam(rho=0.05, gamma=0.9), momentum)
compare("WSAM, decouple=False", coupled, "wsam__sgdm_rho0.05_gamma0.9_coupled")
friendly = optax.chain(samx.friendly_sam(rho=0.05, sigma=1.0, decay=0.9), momentum)
compare("Friendly SAM", friendly, "fsam__sgdm")
looksam = optax.chain(samx.looksam(rho=0.05, period=5, alpha=0.7), momentum)
compare("LookSAM", looksam, "looksam_becker__sgdm_k5_a0.7_rho0.05")

# %% [markdown]
# (LookSAM's 1e-11 is an epsilon of 1e-12 in that code's projection, which the small denominators of
# LookSAM magnify.)
#
# Two classes compute something else. Here are their lines, read in the repository at commit
# `7a076d2` of February 2026, and written again in numpy (LookSAM with a step counter of its own:
# the class takes the base optimizer's, which SGD with momentum does not have):


# %%
def pytorch_optimizer_friendly():
    average = {}

    def direction_at(_, w, grad, rho=0.05, sigma=1.0, decay=0.9):
        g = grad(w)
        if not average:
            average.update(g)
        else:  # `grad` is changed in place, so the average gets the difference, not the gradient
            g = {k: g[k] - sigma * average[k] for k in g}
            average.update({k: decay * average[k] + (1 - decay) * g[k] for k in g})
        scale = rho / (norm(g) + 1e-12)
        return grad({k: w[k] + scale * g[k] for k in w})

    return direction_at


def pytorch_optimizer_looksam():
    kept = {}

    def direction_at(t, w, grad, rho=0.05, k=5, alpha=0.7):
        g = grad(w)
        lengths = {n: norm({n: g[n]}) for n in g}  # of each tensor on its own
        if t % k:
            return {n: g[n] + alpha * lengths[n] / (norm({n: kept[n]}) + 1e-8) * kept[n] for n in g}
        scale = rho / (norm(g) + 1e-12)
        g_s = grad({n: w[n] + scale * g[n] for n in w})
        kept.update({n: g_s[n] - (g[n] * g_s[n]).sum() / lengths[n] ** 2 * g[n] for n in g})
        return g_s

    return direction_at


others = {
    "FriendlySAM of pytorch_optimizer": (pairs["Friendly SAM"][1], pytorch_optimizer_friendly()),
    "LookSAM, tensor by tensor": (pairs["LookSAM"][1], pytorch_optimizer_looksam()),
}
others = {name: (theirs, by_hand(lines)) for name, (theirs, lines) in others.items()}
for name, pair in others.items():
    print(f"{name:<34} {difference(*pair).max():.0e} from the recorded run")

# %% [markdown]
# | pytorch_optimizer | samx | the same numbers? |
# |---|---|---|
# | `SAM(rho=0.05, adaptive, perturb_eps)` | as for `davda54/sam` | yes |
# | `SAM(use_gc=True)`, "GCSAM" | not offered | it centralizes the ascent gradient after its norm was taken |
# | `GSAM(base, model, rho_scheduler, alpha=0.4)` | `samx.gsam(rho, alpha=0.4)`, `rho` a schedule | the same rule; other epsilons; each worker decomposes its own gradients |
# | `GSAM(adaptive=True)` | `perturbation=metric_ball(rho, magnitude(0.0, is_scaled=is_any))` | the geometry of `davda54/sam`, not that of `big_vision` |
# | `WSAM(rho=0.05, gamma=0.9, decouple=True)` | `samx.wsam(base, learning_rate, rho=0.05, gamma=0.9)` | yes |
# | `WSAM(decouple=False)` | `samx.coupled_wsam(rho=0.05, gamma=0.9)` | yes |
# | `WSAM(max_norm=...)` | not offered; clip in `base` | it clips the second gradient, the authors' last version clips both |
# | `LookSAM(rho=0.1, k=10, alpha=0.7)` | `samx.looksam(rho=0.1, period=10, alpha=0.7)` | **no**: it projects and rescales each tensor on its own. With `step(closure)` it takes the second gradient on every step, so it saves nothing |
# | `FriendlySAM(rho=0.05, sigma=1.0, lmbda=0.9)` | `samx.friendly_sam(rho=0.05, sigma=1.0, decay=0.9)` | **no**: its moving average is of $d = g - \sigma m$; the authors average $g$ |
# | `BSAM(num_data, ...)` | not offered | **no**: it is not the rule of bSAM's authors (its noise has another standard deviation, and is never removed from the weights) |
#
# If you come from one of the last three, tune again.
#
# ## All of it in one figure

# %%
figures.use_style()
shown = {
    "SAM, momentum": ("davda54/sam", figures.BLUE),
    "optax.contrib.sam": ("optax.contrib.sam", figures.SKY),
    "GSAM, falling radius": ("GSAM, big_vision", figures.GREEN),
    "WSAM": ("WSAM, dlrover", figures.ORANGE),
    "LookSAM": ("LookSAM, MSAM", figures.PINK),
}
losses = jax.jit(jax.vmap(loss_fn, (0, None)))
steps = np.arange(1, STEPS + 1)
figure, (top, bottom) = plt.subplots(2, 1, figsize=(9.5, 6.6), sharex=True, height_ratios=(1.2, 1))
for name, (label, color) in shown.items():
    ours, theirs = pairs[name]
    top.plot(steps, losses(ours, data), color=color, label=label)
    top.plot(steps, losses(theirs, data), "o", color=color, mfc="none", ms=9, label="_theirs")
    bottom.plot(steps, np.maximum(difference(ours, theirs), 1e-17), color=color, label=label)
for name, pair in others.items():
    bottom.plot(steps, np.maximum(difference(*pair), 1e-17), "--", color=figures.GREY, label=name)
largest = max(difference(*pairs[name]).max() for name in shown)
top.set(
    title=f"Five codes (circles) and samx (lines): the parameters agree to {largest:.0e}",
    ylabel="loss on all examples",
    ylim=(0.1, 1.6),
)
bottom.set(
    title="Two ports (dashed) are other algorithms under a known name",
    yscale="log",
    xlabel="step",
    xticks=steps,
    ylabel="largest difference\nof a parameter",
    ylim=(1e-17, 10),
)
figures.label_ends(top)
figures.label_ends(bottom)
plt.show()

# %% [markdown]
# ## Where to go next
#
# - [SAM in five minutes](sam_in_five_minutes.ipynb): what the readings in `state` tell you, and
#   what to expect of SAM.
# - [The contract](contract.md): every keyword of `update`, and where clipping and weight decay go.
# - [Training loops](training_loops.ipynb): BatchNorm, dropout, Flax, Equinox, half precision.
# - [Choosing ρ](choosing_rho.ipynb), if your old radius was for another geometry.
# - [Fidelity](fidelity.md): every code that samx was compared with.
