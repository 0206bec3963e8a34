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
# # Write your own variant
#
# After this page you can write a new variant of SAM, test it so that a mistake shows, compare it
# with others on real data, and add it to samx. The example is Fisher SAM
# ([Kim et al., 2022](https://arxiv.org/abs/2206.04920)), from the first line to green tests. The
# page runs in about a minute.
#
# A step of SAM has four parts, and a new idea usually changes one of them:
#
# | your idea changes | you write |
# |---|---|
# | the shape of the ball that is climbed | a function for `samx.perturbations.ball` (section 1) |
# | the gradient that is climbed | an optax transformation, chained before a ball |
# | the steps on which SAM is used | a policy for `samx.perturb_if` |
# | the step itself | an `update_fn` for `samx.closure_transformation` (section 4) |
#
# Fisher SAM changes the ball. It measures a perturbation with the diagonal of the Fisher
# information, so the ball is narrow where the gradient is large:
#
# $$F = 1 + \eta \, g^2, \qquad
#   \epsilon = \rho \, \frac{F^{-1} g}{\sqrt{\langle g, F^{-1} g \rangle}}, \qquad
#   \langle \epsilon, F \epsilon \rangle = \rho^2.$$
#
# ## 1. Six lines

# %%
import dataclasses
import functools
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import examples
import samx
from examples.common import digits_task, figures, tuning


# %%
def fisher_step(g, radius, eta):
    """From a gradient to the perturbation ε."""
    f = jax.tree.map(lambda g: g / (1 + eta * g**2), g)
    length = jnp.sqrt(optax.tree.vdot(g, f)) + 1e-30  # a zero gradient gives a zero step
    return optax.tree.scale(radius / length, f)


def fisher_ball(rho, eta=1.0, step=fisher_step):
    return samx.perturbations.ball(rho, lambda g, _, radius: step(g, radius, eta))


def fisher_sam(rho=0.1, eta=1.0, step=fisher_step):
    return samx.sharpness_aware(fisher_ball(rho, eta, step))


# %% [markdown]
# That is the variant. `fisher_step` is the paper's formula; `ball` gives it a radius, which may be a
# schedule, and gradients of at least float32; `sharpness_aware` takes the gradient at
# $w + \epsilon$. A first look, on a loss whose gradient at $w$ is $w$:

# %%
W = jnp.array([0.5, -2.0, 0.001])


def perturbations(tx, w=W, steps=1):
    """The perturbations of some steps at the same point; ∇L(w + ε) is w + ε here."""
    state, seen = tx.init(w), []
    for _ in range(steps):
        g_s, state = tx.update(w, state, w, value_fn=lambda w: w @ w / 2)
        seen.append(g_s - w)
    return seen


print("SAM       ", *perturbations(samx.sam(0.1)))
print("Fisher SAM", *perturbations(fisher_sam(0.1)))

# %% [markdown]
# The second element has the largest gradient, and Fisher SAM moves it less than SAM does.
#
# ## 2. Checks that can fail
#
# A wrong SAM still trains, and often not badly. So check what must hold exactly. There are two
# kinds of checks. *Properties* follow from the formula. An *oracle* is an independent computation
# that says where every step ends: a loop in plain numpy, or recorded numbers of somebody else's
# code. samx's repository has a recorded run of Fisher SAM (by a third party; the authors published
# no code) on a tiny network, in float64.

# %%
TESTS = Path(examples.__file__).parents[1] / "tests" / "support"
sys.path.insert(0, str(TESTS))  # the tests' own table, checks and tiny network

import cases
import checks
import problem

STEPS = 12
recorded, meta = problem.load("fishersam_thirdparty__sgd_gamma0.1_eta1.0")
print(meta["source"])


# %%
@jax.jit
def gradient(params, batch):
    return jax.grad(lambda w: problem.losses_fn(w, batch).mean())(params)


def loop_in_numpy(rho=0.1, eta=1.0, learning_rate=0.1):
    """Fisher SAM over gradient descent, without samx or optax."""
    data, w = jax.device_get(problem.make())
    for t in range(STEPS):
        batch = problem.batch_at(data, t)
        g = jax.device_get(gradient(w, batch))
        fisher = {name: 1 + eta * leaf * leaf for name, leaf in g.items()}
        length = np.sqrt(sum((g[name] ** 2 / fisher[name]).sum() for name in g))
        there = {name: w[name] + rho * g[name] / fisher[name] / length for name in g}
        g_s = jax.device_get(gradient(there, batch))
        w = {name: w[name] - learning_rate * g_s[name] for name in g}
    return w


with jax.enable_x64(True):
    by_loop = loop_in_numpy()
by_others = {name: leaf[STEPS - 1] for name, leaf in recorded.items()}


@functools.cache
def end_of(make):
    """The parameters after the last step."""
    with jax.enable_x64(True):
        path = problem.train(optax.chain(make(0.1, 1.0), optax.sgd(0.1)), STEPS)
    return {name: leaf[-1] for name, leaf in path.items()}


def apart(make, expected):
    return max(np.abs(leaf - expected[name]).max() for name, leaf in end_of(make).items())


def is_sam_without_eta(make):
    return np.allclose(*perturbations(make(0.1, 0.0)), *perturbations(samx.sam(0.1)))


def ends_on_its_ball(make):
    (eps,) = perturbations(make(0.3, 4.0))
    return np.isclose((eps**2 * (1 + 4.0 * W**2)).sum(), 0.3**2)


def climbs(make):
    (eps,) = perturbations(make(0.3, 4.0))
    return (W + eps) @ (W + eps) > W @ W


def follows_a_schedule(make):
    seen = perturbations(make(optax.linear_schedule(0.3, 0.1, 2), 0.0), steps=3)
    return np.allclose([jnp.linalg.norm(eps) for eps in seen], [0.3, 0.2, 0.1])


def stays_at_a_zero_gradient(make):
    (eps,) = perturbations(make(0.1, 1.0), jnp.zeros(3))
    return not np.any(eps)


def equals_the_loop(make):
    return apart(make, by_loop) < 1e-12


def equals_the_recorded_run(make):
    return apart(make, by_others) < 1e-10


MY_CHECKS = (
    is_sam_without_eta,
    ends_on_its_ball,
    climbs,
    follows_a_schedule,
    stays_at_a_zero_gradient,
    equals_the_loop,
    equals_the_recorded_run,
)
for check in MY_CHECKS:
    print(f"{check.__name__:<26} {'green' if check(fisher_sam) else 'RED'}")

ours, theirs = perturbations(fisher_sam()), perturbations(samx.fisher_sam())
print(f"largest difference from the loop: {apart(fisher_sam, by_loop):.0e}")
print(f"largest difference from the recorded run: {apart(fisher_sam, by_others):.0e}")
print(f"the same step as samx.fisher_sam: {np.allclose(*ours, *theirs, rtol=1e-6)}")

# %% [markdown]
# Green checks prove little until they have been red. So break the variant on purpose, in five ways
# that a tired author might, and see which checks notice:


# %%
def broken(mistake):
    """`fisher_step` with one mistake."""

    def step(g, radius, eta):
        tiny = 0.0 if mistake == "no tiny number" else 1e-30
        power = 1 if mistake == "multiplies by F" else -1
        f = jax.tree.map(lambda g: g * (1 + eta * g**2) ** power, g)
        other = f if mistake == "another norm" else g
        length = jnp.sqrt(optax.tree.vdot(other, f)) + tiny
        radius = 0.1 if mistake == "frozen radius" else radius
        sign = -1 if mistake == "flipped sign" else 1
        return optax.tree.scale(sign * radius / length, f)

    return functools.partial(fisher_sam, step=step)


MISTAKES = (
    "none",
    "flipped sign",
    "multiplies by F",
    "another norm",
    "frozen radius",
    "no tiny number",
)
found = {}
for name in MISTAKES:
    make = broken(name)
    found[name] = [check(make) for check in MY_CHECKS]
print(f"{'':<26}" + "".join(f"{name:>17}" for name in MISTAKES))
for index, check in enumerate(MY_CHECKS):
    row = "".join(f"{'.' if found[name][index] else 'RED':>17}" for name in MISTAKES)
    print(f"{check.__name__:<26}{row}")
assert all(found["none"])
assert not any(all(found[name]) for name in MISTAKES[1:])

# %% [markdown]
# Read the rows. Every mistake is noticed, but no check notices all of them. The limit $\eta = 0$,
# which is often the only check, does not notice a metric that is upside down. The two oracles find
# every wrong formula, but they use one radius and never meet a zero gradient. You need both kinds.
#
# ## 3. It is an optax transformation
#
# So it goes wherever one goes: into a chain, under `jit` and `vmap`, under a policy, and its ball
# into any other variant.

# %%
base = optax.sgd(0.1, momentum=0.9)
compositions = {
    "clipping, then AdamW": optax.chain(
        fisher_sam(), optax.clip_by_global_norm(1.0), optax.adamw(0.01)
    ),
    "a radius that falls": optax.chain(fisher_sam(optax.linear_schedule(0.2, 0.1, 6)), base),
    "on every second step": optax.chain(
        samx.perturb_if(samx.policies.every(2), fisher_sam()), base
    ),
    "inside LookSAM": optax.chain(samx.looksam(period=3, perturbation=fisher_ball(0.1)), base),
    "inside Friendly SAM": optax.chain(samx.friendly_sam(perturbation=fisher_ball(0.1)), base),
}
data, start = problem.make("float32")
print(f"{'':<22} {'sharp steps':<13} gradients   radius of the last sharp step")
for name, tx in compositions.items():
    tx = samx.all_readings(tx)
    step, params, state = jax.jit(problem.make_step(tx)), start, tx.init(start)
    sharp, radius = "", 0.0
    for t in range(6):
        params, state = step(params, state, problem.batch_at(data, t))
        readings = optax.tree.get(state, "readings")
        sharp += " x" if readings.is_sharp else " ."
        radius = readings.perturbation_norm if readings.is_sharp else radius
    print(f"{name:<22}{sharp:<13} {int(readings.gradients_spent):>8} {radius:>12.3f}")

# %% [markdown]
# The last column is the Euclidean length of ε, which is a little below ρ: in the metric $F$ it is
# exactly ρ.
#
# ## 4. When the step itself is new
#
# `closure_transformation` makes a variant from an `init_fn` and an `update_fn`, and checks
# everything that callers can do wrong. As an example, SAM with a second look in the opposite
# direction: the mean of the gradients at $w + \epsilon$ and $w - \epsilon$. What is linear in
# $\epsilon$ cancels. What is left besides the gradient at $w$ is a term that lowers the curvature
# along $\epsilon$:


# %%
def two_sided_sam(rho):
    def update_fn(g, state, params, *, value_fn):
        eps = optax.tree.scale(rho / (optax.tree.norm(g) + 1e-30), g)
        _, g_up = samx.value_and_grad_at(value_fn, params, eps)
        _, g_down = samx.value_and_grad_at(value_fn, params, optax.tree.scale(-1.0, eps))
        return optax.tree.scale(0.5, optax.tree.add(g_up, g_down)), state

    return samx.closure_transformation(lambda _: optax.EmptyState(), update_fn)


tx = two_sided_sam(0.1)
(nothing,) = perturbations(tx)
print("on a quadratic loss both sides cancel:", np.allclose(nothing, 0, atol=1e-6))
try:
    tx.update(W, tx.init(W), W)
except ValueError as error:
    print(str(error).partition(" Call")[0])

# %% [markdown]
# The argument `value_fn` has no default, so callers must pass it, and the message says how. The
# check is again a property that only the right formula has.
#
# ## 5. Among the others
#
# Now real data: scikit-learn's digits with 30% wrong training labels, a network with two hidden
# layers, batches of 100, a cosine schedule, 40 epochs (80 for "base, twice the epochs"). All seeds
# and all candidates train at once under `vmap`, the radius included.

# %%
WIDTH, NOISE, EPOCHS, SEEDS, TUNING_SEEDS = 64, 0.3, 40, range(12), tuning.TUNING_SEEDS
graph, _ = nnx.split(digits_task.Network(WIDTH, rngs=nnx.Rngs(0)))


def logits(params, x):
    return nnx.merge(graph, params)(x)


def loss_fn(params, batch):
    scores = logits(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()


def train(make_tx, epochs, seed, learning_rate, rho, params, splits):
    """Validation and test accuracy of one network."""
    train_set, validation, test = splits
    schedule = optax.cosine_decay_schedule(learning_rate, epochs * digits_task.STEPS_PER_EPOCH)
    tx = make_tx(rho, optax.sgd(schedule, momentum=0.9))
    order = jax.vmap(digits_task.shuffled, (None, 0))(seed, jnp.arange(epochs))

    def step(carry, rows):
        params, state = carry
        batch = digits_task.rows_of(train_set, rows)
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=lambda w: loss_fn(w, batch)
        )
        return (optax.apply_updates(params, updates), state), None

    start = params, tx.init(params)
    (params, _), _ = jax.lax.scan(step, start, order.reshape(-1, digits_task.BATCH))
    return [(logits(params, x["x"]).argmax(-1) == x["y"]).mean() for x in (validation, test)]


def accuracies(run, seeds, candidates):
    """Validation and test accuracy in percent: arrays [candidates, seeds]."""
    seed, learning_rate, rho = tuning.runs_of(seeds, candidates)
    start = digits_task.initialize(seed, WIDTH)
    found = run(seed, learning_rate, rho, start, digits_task.split(seed, NOISE))
    return [100 * np.reshape(x, (len(candidates), -1)) for x in found]


# %% [markdown]
# Every method has three candidates, tried with four seeds that are not used again. The best on
# validation data is trained with twelve other seeds and tested. The base chooses its learning rate.
# The others take 0.1, and choose the radius. That is a coarse search, with one number for each
# method; `examples/digits.py` searches both.


# %%
def in_front(make):
    return lambda rho, base: optax.chain(make(rho), base)


def looksam_on_my_ball(rho):
    return samx.looksam(period=5, alpha=0.1, perturbation=fisher_ball(rho))


methods = {  # how to make it, gradients per step, epochs, the numbers to choose from
    "base": (lambda _, base: base, 1, EPOCHS, (0.02, 0.05, 0.1)),
    "base, twice the epochs": (lambda _, base: base, 1, 2 * EPOCHS, (0.01, 0.02, 0.05)),
    "SAM": (in_front(samx.sam), 2, EPOCHS, (0.1, 0.2, 0.5)),
    "ASAM": (in_front(samx.asam), 2, EPOCHS, (0.25, 0.5, 1.0)),
    "your Fisher SAM": (in_front(fisher_sam), 2, EPOCHS, (0.1, 0.2, 0.5)),
    "LookSAM on your ball": (in_front(looksam_on_my_ball), 1.2, EPOCHS, (0.2, 0.5, 1.0)),
    "your two-sided SAM": (in_front(two_sided_sam), 3, EPOCHS, (0.2, 0.5, 1.0)),
}
results = {}
print(f"{'':<24} {'chosen':<18} {'test accuracy, %':<18} gradients")
for name, (make, cost, epochs, numbers) in methods.items():
    candidates = [(x, 0.0) if "base" in name else (0.1, x) for x in numbers]
    run = jax.jit(jax.vmap(functools.partial(train, make, epochs)))
    validation, _ = accuracies(run, TUNING_SEEDS, candidates)
    best = int(validation.mean(axis=1).argmax())
    _, (test,) = accuracies(run, SEEDS, candidates[best : best + 1])
    results[name] = cost * epochs * digits_task.STEPS_PER_EPOCH, test
    error = test.std(ddof=1) / len(test) ** 0.5
    rate, rho = candidates[best]
    chosen = f"rho {rho}" if rho else f"learning rate {rate}"
    edge = " (at the edge)" if best in (0, len(candidates) - 1) else ""
    print(
        f"{name:<24} {chosen:<18} {test.mean():.2f} ± {error:.2f}       {results[name][0]:>6.0f}{edge}"
    )


# %%
def lead(name, other):
    """The mean difference and its standard error, seed by seed."""
    difference = results[name][1] - results[other][1]
    return f"{difference.mean():+.2f} ± {difference.std(ddof=1) / len(difference) ** 0.5:.2f}"


rival = max(("base", "base, twice the epochs"), key=lambda name: results[name][1].mean())
for name, other in (
    ("your Fisher SAM", rival),
    ("your Fisher SAM", "SAM"),
    ("LookSAM on your ball", "SAM"),
    ("your two-sided SAM", "SAM"),
):
    print(f"{name} minus {other}: {lead(name, other)} points")

# %%
figures.use_style()
figure, axis = plt.subplots(figsize=(9.5, 5))
groups = {}
for name, (spent, test) in results.items():
    groups.setdefault(spent, []).append((test.mean(), name, test.std(ddof=1) / len(test) ** 0.5))
for spent, group in groups.items():
    below = -np.inf
    for index, (mean, name, error) in enumerate(sorted(group)):
        color = figures.RED if "your" in name else figures.GREY if "base" in name else figures.BLUE
        at = spent + 14 * (index - (len(group) - 1) / 2)  # so that error bars do not overlap
        axis.errorbar(at, mean, error, fmt="o", color=color, markersize=8)
        below = max(mean, below + 0.2)
        axis.annotate(name, (spent + 40, below), color=color, va="center")
axis.set(
    title=f"Six lines: {lead('your Fisher SAM', rival)} points over the better of two bases",
    xlabel="gradients spent",
    ylabel="test accuracy, %, 30% wrong labels",
    xlim=(350, 1500),
)
plt.show()

# %% [markdown]
# Error bars are one standard error over the seeds, each of which has its own split, labels, initial
# weights and batches. Points that spent the same number of gradients are drawn side by side.
#
# The sharp methods are ahead of the base, and close to one another. Seed by seed, Fisher SAM seems
# to be a little behind SAM. Do not write a paper about such a difference, in either direction: it is
# one of several that were looked at, from twelve seeds. With 48 other seeds and the same radius it
# was −0.10 ± 0.05 points. And there is a reason why both are close: the gradients of this network
# are small, so $F$ is close to 1.

# %%
seeds = np.arange(len(SEEDS))
params = digits_task.initialize(seeds, WIDTH)
train_set, _, _ = digits_task.split(seeds, NOISE)
first = jax.tree.map(lambda leaf: leaf[:, : digits_task.BATCH], train_set)
grads = jax.jit(jax.vmap(jax.grad(loss_fn)))(params, first)
squares = np.concatenate([np.ravel(leaf) ** 2 for leaf in jax.tree.leaves(grads)])
print(f"F at the first step: mean {1 + squares.mean():.5f}, largest {1 + squares.max():.2f}")

# %% [markdown]
# To learn more about Fisher SAM you would choose $\eta$ too, search learning rates, and look at more
# than one data set. The point here is another one: the idea took six lines, and the comparison was
# made on the same day.
#
# ## 6. Into samx
#
# In the repository a variant is one file and one row of a table. The row of Fisher SAM:

# %%
(entry,) = samx.catalog("fisher_sam")
for field in ("name", "call", "paper", "shape", "closures", "gradients", "state", "fidelity"):
    print(f"{field:<10} {getattr(entry, field)}")

# %% [markdown]
# Tests are generated from the rows; nobody writes them for each variant. Here they are, on *your*
# function in place of samx's. They ask for more than section 2 did: one bad batch must not spoil the
# state for ever, a loss that is $2^{560}$ times as large must give finite steps, dtypes must stay.

# %%
CHECKS = checks.CHECKS


def try_all(factory):
    """Run the repository's checks of a row on this factory."""
    row = dataclasses.replace(cases.VARIANTS["fisher_sam"], factory=factory)
    program = functools.cache(checks.program.__wrapped__)  # nothing of an earlier factory
    with (
        mock.patch.dict(cases.VARIANTS, {"yours": row}),
        mock.patch.object(checks, "program", program),
        jax.enable_x64(True),
    ):
        for check in CHECKS:
            try:
                check("yours")
                yield check.__name__, True
            except AssertionError:
                yield check.__name__, False


right, wrong = dict(try_all(fisher_sam)), dict(try_all(broken("another norm")))
print(f"{'':<48} yours   with another norm")
for name in right:
    print(f"{name:<48} {'green' if right[name] else 'RED':<7} {'green' if wrong[name] else 'RED'}")
assert all(right.values())

# %% [markdown]
# What a contribution needs:
#
# 1. **The file** `samx/variants/your_name.py`. [samx's Fisher SAM](../samx/variants/fisher_sam.py)
#    has two lines more than yours: they keep the squares from overflowing.
# 2. **The row** in `samx/catalog/table.py`: call, paper, cost, and how faithful it is to what.
# 3. **The name** in `samx/__init__.py`.
# 4. **An oracle**: a recorded run of the authors' code, or a loop such as `loop_in_numpy`. A row
#    without an oracle does not load.
#
# Then `python -m pytest -q -k your_name` runs all of the checks above and those for several devices,
# half precision and policies, and `examples/digits.py --variants your-name` trains it.
# [CONTRIBUTING](../.github/CONTRIBUTING.md) has the whole list.
#
# ## Where to go next
#
# - [Choosing ρ](choosing_rho.ipynb): radius and learning rate together, in one compiled program.
# - [Which variant](which_variant.ipynb): the same comparison, for all variants and tuned finely.
# - [Training loops](training_loops.ipynb): your variant in Flax, with BatchNorm, in half precision.
# - [The contract](contract.md): everything that `update` promises.
