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
# # Asynchronous training: AsyncSAM and LSAM
#
# SAM waits twice. Its second gradient waits for the first one. And on several devices every step
# waits for the slowest device. After this page you can remove either wait, and you know what that
# costs in accuracy. It runs in about a minute.
#
# - **AsyncSAM** ([Jo, Lim and Lee, 2025](https://arxiv.org/abs/2503.11147)) computes both gradients
#   of a step at the same time, on two devices. The second device may be a slower one.
# - **LSAM** ([Teng and Zhang, 2025](https://arxiv.org/abs/2509.03110)) lets many workers train at
#   their own pace, around a common center.
#
# No code by the authors could be found. AsyncSAM is partly **reconstructed** in samx, and LSAM
# wholly: their docstrings say what is known and what is inferred.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # simulated devices; before anything touches a device

# %%
import itertools
import time
import warnings

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import samx
from examples.claims import async_cost, async_digits, lsam_digits
from examples.common import digits_task, figures, training
from examples.common.tuning import Runs, runs_of
from samx import elastic

figures.use_style()
SEEDS, EPOCHS, GRADIENTS, REPEATS = 10, 40, 3200, 5


def mean_and_error(values):
    """Return the mean over the seeds and its standard error."""
    values = np.asarray(values, np.float64)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


# %% [markdown]
# ## 1. AsyncSAM: climb a gradient that is one step old
#
# SAM climbs the gradient at $w_t$. AsyncSAM climbs $a_{t-1}$, the gradient that was computed during
# the last step:
#
# $$\epsilon_t = \rho\,\frac{a_{t-1}}{\|a_{t-1}\|}, \qquad
#   \underbrace{g_t = \nabla L(w_t + \epsilon_t)}_{\text{one device}}, \qquad
#   \underbrace{a_t = \nabla L_\text{ascent}(w_t)}_{\text{the other device}}$$
#
# Both points, $w_t + \epsilon_t$ and $w_t$, are known when the step begins. So the gradients do not
# wait for each other. The slower device may compute $a_t$ from fewer examples, b′ of the b.

# %%
figure, axis = plt.subplots(figsize=(9.5, 2.9))
boxes = [(3, t, 1, f"$g_{t + 1}$", figures.GREY) for t in range(6)]  # row, start, length, text
boxes += [(2, 2 * t, 1, f"$a_{t + 1}$", figures.ORANGE) for t in range(3)]
boxes += [(2, 2 * t + 1, 1, f"$g_{t + 1}$", figures.BLUE) for t in range(3)]
boxes += [(1, t, 1, f"$g_{t + 1}$", figures.BLUE) for t in range(6)]
boxes += [(0, t, 0.9, f"$a_{t + 1}$", figures.ORANGE) for t in range(6)]
for row, begin, length, text, color in boxes:
    axis.barh(row, length, left=begin, color=color, edgecolor="white", linewidth=2, height=0.72)
    axis.text(begin + length / 2, row, text, color="white", ha="center", va="center")
for t in range(5):
    axis.annotate(
        "", (t + 1.15, 0.62), (t + 0.85, 0.38), arrowprops={"arrowstyle": "->", "lw": 1.5}
    )
axis.set_yticks([3, 2, 1, 0])
axis.set_yticklabels(["SGD", "SAM", "AsyncSAM,\nfast device", "AsyncSAM,\nslow device"])
axis.set(xlabel="time, in gradients of the fast device", xlim=(0, 6.05))
axis.set_title("SAM takes three steps in this time, AsyncSAM six: orange climbs, blue descends")
axis.spines["left"].set_visible(False)
axis.tick_params(left=False)
plt.show()

# %% [markdown]
# This is a drawing, not a measurement. An arrow is an ascent gradient that goes to the fast device,
# where the next step climbs it. The first step has nothing to climb: it is SGD's.
#
# ### Two devices, one Python thread
#
# `samx.asynchronous.pipelined` drives both devices. Calls of compiled functions return before their
# results are there, and a device waits for the other one only where it needs a result. You write
# `descend`, an ordinary step that passes `ascent_grad` as the gradient, and `ascend`, a gradient.
#
# First `calibrate_ascent_batch` measures the largest b′ whose gradient the slower device finishes
# in time. The loss here is a loop of small elementwise operations that keeps one core busy: a
# program of matrix products would take all cores of a CPU.

# %%
loss, params, batch = async_cost.elementwise(batch_size=64, length=1000)
fast, slow = jax.devices()[0], jax.devices("cpu")[1]
found = samx.asynchronous.calibrate_ascent_batch(
    jax.grad(loss), params, batch, descent_device=fast, ascent_device=slow
)
print(async_cost.describe_ascent_batch(found))

# %%
tx = optax.chain(samx.async_sam(rho=0.05), optax.sgd(1e-3, momentum=0.9))


def descend(params, opt_state, batch, ascent_grad):
    updates, opt_state = tx.update(
        ascent_grad, opt_state, params, value_fn=lambda params: loss(params, batch)
    )
    return optax.apply_updates(params, updates), opt_state, optax.tree.get(opt_state, "sharp_loss")


pairs = [(batch, jax.tree.map(lambda leaf: leaf[: found.size], batch))] * 5
steps = samx.asynchronous.pipelined(
    descend,
    jax.grad(loss),
    params,
    tx.init(params),
    pairs,
    descent_device=fast,
    ascent_device=slow,
)
*_, step = steps  # float(step.out) waits for a step
print(f"sharp loss after {len(pairs)} steps: {float(step.out):.4f}")

# %% [markdown]
# What does it save? SGD and SAM on one device, AsyncSAM on two, in interleaved rounds; medians
# relative to SGD in the same round.

# %%
rows = async_cost.make_rows(loss, params, batch, 64, (fast, slow))
rows = {name: rows[name] for name in ("sgd", "sam", "async-sam, b", "async-sam, b/2")}
for steps in rows.values():
    async_cost.timed(steps, 1)  # compile
rounds = {name: [] for name in rows}
for _ in range(REPEATS):
    for name, steps in rows.items():
        rounds[name].append(async_cost.timed(steps, 3)[1])
print(f"{'step':<16} {'ms':>6} {'time / SGD [quartiles]':>24}")
for name, seconds in rounds.items():
    low, middle, high = np.quantile(np.divide(seconds, rounds["sgd"]), [0.25, 0.5, 0.75])
    spread = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    print(f"{name:<16} {1e3 * np.median(seconds):6.0f} {spread:>24}")

# %% [markdown]
# These times depend on the machine, and on what else it does: the second device has to be idle. On
# two cores that are otherwise idle SAM takes 2.2 to 2.4 times as long as SGD, and AsyncSAM 1.0 to
# 1.2 times as long. While other programs use both cores, AsyncSAM takes about twice as long as SGD,
# and saves little. The calibration measures one device at a time, and does not see what they do to each
# other. `examples/claims/async_cost.py` measures it with more rounds.
#
# - **The same numbers** as `tx.update(..., ascent_fn=...)` on one device, to the last bit on the
#   CPU. Checkpoints go from one to the other: `opt_state` holds the ascent gradient.
# - **What ends the overlap**: a host callback in one of the programs, both programs on one device,
#   or reading a result in every step while your loader has no next batch ready.
# - **When training stops**, by an error of the loader, a batch that does not fit, or a `break`, the
#   last step stays usable: save it, or continue from it with a new call. So a pair is fetched only
#   after the step before it was handed out.
# - **With a GPU** let JAX see the CPU too: leave `JAX_PLATFORMS` unset, or set it to `cuda,cpu`.
#   samx was not yet measured on one.
# - **Devices of one kind** can share one program inside `shard_map` or `pmap`:
#   `samx.async_sam(role_axis="role")`, with an axis of size 2 beside an axis of data. A step is
#   then one gradient and one all-reduce of two copies of the parameters.
#
# ### What the old gradient costs
#
# Digits with 30 % wrong training labels. Learning rates and radii were chosen on validation images
# by `examples/claims/async_digits.py`. Every run trains on one device, since two devices give
# the same numbers.

# %%
CHOSEN = {  # learning rate, rho
    "base": (0.05, 0.0),
    "sam": (0.1, 0.2),
    "async-sam, b": (0.1, 0.2),
    "async-sam, b/4": (0.1, 0.2),
}


def accuracy_of(row, learning_rate, rho):
    """Return the test accuracy of each seed, in percent."""
    runs = Runs(*runs_of(range(SEEDS), [(learning_rate, rho)]))
    data = digits_task.split(runs.seed, 0.3)
    weights = digits_task.initialize(runs.seed, 64)
    trainer = training.make_trainer(async_digits.ROWS[row], "momentum", 64, EPOCHS)
    train_set, _, test_set = data
    trained = training.train(trainer, weights, runs, train_set, EPOCHS, lambda _: None, test_set)
    return 100 * trained.accuracies[-1]


accuracies = {row: accuracy_of(row, *numbers) for row, numbers in CHOSEN.items()}
print(f"{'':<16} {'test accuracy, %':>16} {'minus SAM':>14} {'minus SGD':>14}")
for row, values in accuracies.items():
    cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(values))]
    for other in ("sam", "base"):
        difference = values - accuracies[other]
        cells.append("{:+.1f} ± {:.1f}".format(*mean_and_error(difference)) if other != row else "")
    print(f"{row:<16} {cells[0]:>16} {cells[1]:>14} {cells[2]:>14}")

# %% [markdown]
# Is AsyncSAM as accurate as SAM? With wrong labels, no. With b′ = b it keeps about six tenths of
# SAM's gain over SGD, and with b/4 about three tenths; it is two and more standard errors below
# SAM. With clean labels there is nothing to gain, and it is 0.3 to 0.4 points below SAM
# ([the papers' claims](claims.md)). The age of the gradient is not the reason: an old gradient of
# the step's own batch costs nothing that shows. The other batch is, and smaller steps do not change
# it. So: if SAM's time is a problem and a second device stands idle, AsyncSAM is a middle way. Its
# rival is `momentum_sam`, which needs no second device.
#
# ## 2. LSAM: workers around a center
#
# Under data parallelism all devices wait for the slowest one. And more devices mean a larger batch,
# or smaller shares of it; SAM likes neither. LSAM's workers train on separate batches, each at its
# own pace. Every `period` local steps a worker and the center move towards each other:
#
# $$d = \alpha\,(w_i - z), \qquad z \leftarrow z + d, \qquad w_i \leftarrow w_i - d,
#   \qquad \alpha = \beta / \text{workers}$$
#
# The center $z$ is the model. Inside a worker runs your own step, with any variant and any base.
# With plain gradients this is EASGD ([Zhang et al., 2015](https://arxiv.org/abs/1412.6651)), with
# `elastic.nesterov` EAMSGD.
#
# ### Workers that really run at the same time
#
# `elastic.train` starts an engine. The default, `elastic.Threads()`, is one thread per device. You
# write `make_worker`: it is called where the worker runs. Here are four workers. The third one is
# slow, and the last one dies.

# %%
EXCHANGES, SLOW, LIFE = 200, 0.02, 40  # seconds that the slow one sleeps; steps of the last one
train_set, _, test_set = jax.tree.map(lambda leaf: leaf[0], digits_task.split(jnp.arange(1), 0.3))
weights = jax.tree.map(lambda leaf: leaf[0], digits_task.initialize(jnp.arange(1), 64))
mean_loss = async_digits.loss_of(width=64)
local = optax.chain(samx.sam(rho=0.1), optax.sgd(0.1, momentum=0.9))  # any variant, any base


@jax.jit
def local_step(params, opt_state, batch):
    value_fn = lambda params: mean_loss(params, batch)  # noqa: E731
    value, grads = jax.value_and_grad(value_fn)(params)
    updates, opt_state = local.update(grads, opt_state, params, value=value, value_fn=value_fn)
    return optax.apply_updates(params, updates), opt_state, value


def make_worker(index):
    def batches(n):  # the worker's own stream, from its n-th step on
        draw = np.random.default_rng((index, n))
        for step in itertools.count(n):
            if index == 2:
                time.sleep(SLOW)
            if index == 3 and step == LIFE:
                raise OSError("the disk of this worker is full")
            yield digits_task.rows_of(train_set, draw.integers(digits_task.TRAIN, size=100))

    return elastic.Worker(weights, local.init, local_step, batches)


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trained = elastic.train(
        make_worker,
        weights,
        num_workers=4,
        num_exchanges=EXCHANGES,
        rule=elastic.Rule(beta=0.9, period=4),
        engine=elastic.Threads(jax.devices("cpu")[:4]),
    )

print(f"{'worker':<8} {'exchanges':>9} {'mean staleness':>15}  {'status'}")
for record in trained.progress.workers:
    print(
        f"{record.index:<8} {record.exchanges:>9} {record.mean_staleness:>15.1f}  {record.status}"
    )
print(f"all: {trained.progress.exchanges} exchanges. Warnings:")
for warning in caught:
    print("  " + str(warning.message).strip().splitlines()[0])

# %% [markdown]
# A worker that dies, by an exception, a signal or a timeout (`worker_timeout`), is reported, and
# stops nobody: the others do its share. With `max_restarts` it starts again at the center. If fewer
# exchanges are made than requested, a warning and `trained.shortfall` say why.
#
# - **Staleness** is the number of exchanges of others between two of a worker. `max_staleness`
#   bounds it: workers that are ahead then wait.
# - **What a worker sends** must be finite, laid out like the parameters, and no larger than a
#   million times the center. Anything else is refused and counted in `progress.workers`, and ends
#   the worker.
# - **Checkpoints**: `save=` gets a `Checkpoint` on a period and whatever ends the training, also
#   Ctrl-C and SIGTERM; `resume=` continues from one. A save that fails is a warning that says which
#   checkpoint is kept; training goes on.
# - If the center dies, the error is a `CenterLost` whose `checkpoint` is the newest copy.
# - At the end workers have `grace` seconds. Then a process is killed, and a thread is left behind
#   with a warning. `python examples/asynchronous/faults.py` injects 150 faults and checks all of
#   this.
# - `Rule(leader=0.1)` also pulls at the worker with the smallest losses, and
#   `Rule(smoothing="gaussian")` is another reading of LSAM: workers begin at samples around the
#   center.
#
# ### Processes and hosts: Ray
#
# With the extra `ray`, center and workers are processes, on this machine or on a cluster. Nothing
# else changes:
#
# ```python
# trained = elastic.train(make_worker, weights, num_workers=4, num_exchanges=200,
#                         engine=elastic.Ray())             # num_shards= splits a large center
# ```
#
# The center is NumPy and never touches an accelerator. On one machine every socket listens on
# loopback only, and asks for a token. On a cluster of several hosts, `Ray(address=...)`, Ray opens
# ports on all network interfaces, and whoever can connect can run code there. So samx refuses a
# cluster without Ray's token authentication (`RAY_AUTH_MODE=token`), unless you pass
# `allow_unauthenticated=True`. Your `make_worker` is sent to the workers as pickled code. They send
# back arrays, numbers and text, but Ray itself unpickles what it receives: every process of the
# cluster must be trusted.
#
# ### The same on a simulated clock
#
# Who comes when depends on the machine, so a run with an engine cannot be repeated exactly.
# `elastic.Simulation` can: the same arithmetic, driven by events. `elastic.timeline` makes the
# events, from speeds, latency, lost messages, and workers that die and join.

# %%
speeds = [1.0, 1.0, 1.0, 4.0]  # seconds per step: the last worker is four times slower
for who_waits, bound in (("nobody waits", None), ("max_staleness=6", 6), ("max_staleness=3", 3)):
    events = elastic.timeline(speeds, period=4, num_exchanges=400, latency=0.1, max_staleness=bound)
    times = [event.time for event in events if event.kind == "finish"]
    print(f"{who_waits:<16} {len(times) / times[-1]:.2f} local steps per second")
print(f"{'all at one pace':<16} {4 / 4.0:.2f}")

# %% [markdown]
# ### LSAM against SAM that waits
#
# Digits with 30 % wrong labels and eight workers, of which one is four times slower. LSAM gives
# each worker batches of 100 images and lets it go on. Data-parallel SAM takes the 800 images of all
# workers together, and waits for the slowest. All rows but one spend the same number of gradients,
# each of one worker's batch. The functions are those of `examples/claims/lsam_digits.py`,
# which chose learning rate and radius of each row on validation images.

# %%
LSAM_CHOSEN = {  # learning rate, rho
    "dp-sam": (0.1, 0.2),
    "dp-sam, same time": (0.3, 0.1),
    "lsam": (0.3, 0.2),
    "easgd": (0.03, 0.0),
    "sam, one worker": (0.03, 0.5),
}
settings = ["--seeds", str(SEEDS), "--gradients", str(GRADIENTS)]
args = lsam_digits.make_parser().parse_args(settings)
curves = {
    name: lsam_digits.simulate(
        name, Runs(*runs_of(range(SEEDS), [numbers])), args, 20, lambda _: None
    )
    for name, numbers in LSAM_CHOSEN.items()
}
print(f"{'':<18} {'test accuracy, %':>16} {'gradients':>10} {'time':>7} {'LSAM minus it':>15}")
for name, curve in curves.items():
    last = "{:.2f} ± {:.2f}".format(*mean_and_error(100 * curve.test[-1]))
    lead = "{:+.2f} ± {:.2f}".format(
        *mean_and_error(100 * (curves["lsam"].test[-1] - curve.test[-1]))
    )
    lead = "" if name == "lsam" else lead
    print(f"{name:<18} {last:>16} {curve.gradients[-1]:>10} {curve.time[-1]:7.0f} {lead:>15}")

# %%
figure, axis = plt.subplots(figsize=(9.5, 4.4))
names = {
    "lsam": ("LSAM,\nnobody waits", figures.BLUE),
    "dp-sam": ("SAM, all\nworkers wait", figures.RED),
}
for name, (label, color) in names.items():
    curve = curves[name]
    mean, error = mean_and_error(100 * np.array(curve.test).T)
    axis.plot(curve.time, mean, color=color, label=label)
    axis.fill_between(curve.time, mean - error, mean + error, color=color, alpha=0.2, lw=0)
best = max(100 * np.mean(curve.test[-1]) for curve in curves.values())
axis.set(xlabel="time, in gradients of a fast worker", ylabel="test accuracy, %")
axis.set(ylim=(best - 16, best + 1))
ends = [curves[name].time[-1] for name in ("lsam", "dp-sam")]
axis.set_title(
    "One of eight workers is four times slower: LSAM is done at time {:.0f}, SAM at {:.0f}".format(
        *ends
    )
)
figures.label_ends(axis)
plt.show()

# %% [markdown]
# **At equal time** LSAM is far ahead: it uses all of the workers' speed, and data-parallel SAM a
# quarter of it. Compare the rows "lsam" and "dp-sam, same time".
#
# **At equal gradients** it depends. Here LSAM leads data-parallel SAM by about 0.6 points, three
# standard errors. The same script finds no lead with 1600 gradients (+0.08 ± 0.21) or with four
# workers (−0.06 ± 0.29), and with 800 gradients LSAM is behind (−1.28 ± 0.33): a center that is an
# average moves later.
#
# **The sharpness counts**: EASGD, the same workers with plain gradients, is 1.6 points behind.
# And **one worker** that takes all steps alone is as good as LSAM or better. It needs seven times
# as long: many steps on small batches are good for SAM, and LSAM's price is that the steps are
# spread over workers.
#
# The clock is simulated. With real threads and with Ray, four workers on two cores and one of them
# slowed down, LSAM took 10.6 s and 11.2 s where data-parallel SAM took 33.5 s for the same number
# of gradients (`--engine threads`, `--engine ray`; both show the progress of each worker, and
# continue from a checkpoint with `--resume`).
#
# ## Where to go next
#
# - [Eight devices](eight_devices.ipynb): when all devices are equally fast, let them wait.
# - On equal devices `samx.lsam(base, worker_axis="worker")` is the synchronous form of LSAM, inside
#   `shard_map`, `pmap` or `vmap`: one all-reduce of the parameters every `period` steps, and none
#   between.
# - [Devices](devices.md): what an exchange costs with threads and with Ray, and AsyncSAM's times.
# - [The papers' claims](claims.md): the numbers behind this page, with commands and seeds.
