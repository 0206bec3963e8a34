"""What accelerator.py measures: each part takes a `Scale` and returns rows that JSON can hold.

A row that fails holds the reason, and the others go on. The programs of a part are compiled before
anything is timed.
"""

import contextlib
import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
import samx.flax
from examples.common import shapes
from examples.common.async_steps import describe_ascent_batch, make_rows, summarized, timed
from examples.common.gpt import Size, losses_of
from examples.common.language_task import make_task
from examples.common.measuring import (
    WARM_UP,
    Runner,
    compile_all,
    described,
    in_rounds,
    say,
    started,
    time_of,
)
from examples.common.models import CLASSES, MODELS, as_problem, dense
from examples.common.programs import peak_bytes
from examples.common.registry import BASES, VARIANTS, Setting
from examples.common.steps import LEARNING_RATE, RHO, Row, reference_rows, samx_row

SUPPORT = Path(__file__).parents[2] / "tests" / "support"
TOLERANCE = 1e-5  # of a trajectory in float32, relative to the largest parameter

PAIR = ("sampa", "sampa-separate")
# Rows that are fed with images, and their names in the registry.
FED = {"plain": "base", "sam": "sam"}

MOMENTUM = optax.sgd(0.1, momentum=0.9)
TRAJECTORIES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "base__adamw": lambda batch: optax.adamw(0.01, weight_decay=0.01),
    "sam__sgdm_rho0.5": lambda batch: optax.chain(samx.sam(0.5), MOMENTUM),
    "asam__sgdm_rho0.5_eta0.01": lambda batch: optax.chain(samx.asam(), MOMENTUM),
    "sampa__sgdm_lam0.2_rho0.1": lambda batch: samx.sampa(
        MOMENTUM, rho=0.1, lam=0.2, batch_like=batch
    ),
    "looksam_becker__sgdm_k5_a0.7_rho0.05": lambda batch: optax.chain(
        samx.looksam(period=5, alpha=0.7), MOMENTUM
    ),
    "ref_ksam__sgdm_k8_rho0.05": lambda batch: optax.chain(
        samx.ksam(rho=0.05, num_selected=8, num_groups=1), MOMENTUM
    ),
    "momentumsam__sgdm_rho0.3": lambda batch: samx.momentum_sam(MOMENTUM, rho=0.3),
    "gsam__sgdm_alpha0.4_rho0.1": lambda batch: optax.chain(
        samx.gsam(rho=0.1, alpha=0.4), MOMENTUM
    ),
    "wsam__sgdm_rho0.05_gamma0.9": lambda batch: samx.wsam(MOMENTUM, learning_rate=0.1),
    "fsam__sgdm_rho0.1_sigma0.5_lmbda0.95": lambda batch: optax.chain(
        samx.friendly_sam(rho=0.1, sigma=0.5, decay=0.95), MOMENTUM
    ),
    "msam__sgdm_k4": lambda batch: optax.chain(samx.msam(rho=0.1, num_microbatches=4), MOMENTUM),
    "adasam__gamma0.01_rho0.05": lambda batch: samx.adasam(learning_rate=0.01, rho=0.05, eps=1e-8),
}


class Problem(NamedTuple):
    """A model to train: `losses_fn(params, batch) -> [B]` in float32, and a batch."""

    losses_fn: Callable
    params: Any
    batch: dict[str, Any]


class Steps(NamedTuple):
    """A part that times steps: a model, the dtype of its computation, and the rows."""

    model: str
    dtype: str
    rows: tuple[str, ...]


class Scale(NamedTuple):
    """How large everything is: `FULL` for an accelerator, `SMOKE` for a CPU.

    Attributes:
        least_seconds: Of one measurement.
        rounds: Measurements of each row.
        trajectories: Names of the recorded trajectories.
        models: `(dtype, number of examples) -> Problem`, and the number of examples of a step.
        steps: The parts that time steps.
        language: Size of the language model whose memory is counted, and examples of a batch.
        held: The methods whose memory is counted, those that need less first.
        sizes: Batch sizes of SAMPa, for each model.
        async_sam: Model, examples of a batch, and steps of a measurement.
        images: The image model and its batch sizes.
        image_dtypes: Dtypes of the computation for the images.
        seconds: The estimate of each part.
    """

    least_seconds: float
    rounds: int
    trajectories: tuple[str, ...]
    models: dict[str, tuple[Callable[[str, int], Problem], int]]
    steps: tuple[Steps, ...]
    language: tuple[Size, int]
    held: tuple[str, ...]
    sizes: dict[str, tuple[int, ...]]
    async_sam: tuple[str, int, int]
    images: tuple[Callable[..., Any], tuple[int, ...]]
    image_dtypes: tuple[str, ...]
    seconds: dict[str, float]


class Group(NamedTuple):
    """Rows that are timed in the same rounds; `labels` go into their results."""

    rows: dict[str, Row]
    params: Any
    batch: dict[str, Any]
    labels: dict[str, Any]


def group_of(problem: Problem, names: Iterable[str], **labels: Any) -> Group:
    """Return the group of some rows of one problem."""
    rows, (losses_fn, params, batch) = {}, problem
    known = reference_rows(losses_fn)
    for name in names:
        rows[name] = known[name] if name in known else samx_row(name, losses_fn, batch)
    index = jnp.arange(len(jax.tree.leaves(batch)[0]), dtype=jnp.int32)
    return Group(rows, params, batch | {"index": index}, labels)


def lower_row(row: Row, group: Group) -> list[Any]:
    """Lower what copies the parameters and makes the first state, and the step."""

    def start(params):
        return jax.tree.map(jnp.copy, params), row.init(params)

    carry = jax.eval_shape(start, group.params)
    step = jax.jit(lambda *args: row.step(*args), donate_argnums=(0, 1))
    return [jax.jit(start).lower(group.params), step.lower(*carry, group.batch)]


def run_row(row: Row, group: Group, programs: list[Any], least: float) -> Runner:
    """Return the runner of a row: each step takes the memory of the one before."""
    start, step = programs
    carry = start(group.params)

    def advance():
        nonlocal carry
        *carry, loss = step(*carry, group.batch)
        return carry, loss

    return Runner(advance, least, row.cycle, row.settling)


def time_groups(groups: list[Group], scale: Scale) -> list[dict]:
    """Compile the rows of all groups, then time one group after the other."""
    keys = [(number, name) for number, group in enumerate(groups) for name in group.rows]
    programs, failed = compile_all(
        {(n, name): partial(lower_row, groups[n].rows[name], groups[n]) for n, name in keys}
    )
    results = []
    for number, group in enumerate(groups):
        begin = time.perf_counter()
        why = {name: failed[number, name] for name in group.rows if (number, name) in failed}
        runners, not_started = started(
            {
                name: partial(run_row, row, group, programs[number, name], scale.least_seconds)
                for name, row in group.rows.items()
                if (number, name) in programs
            }
        )
        measure = {name: runner.seconds for name, runner in runners.items()}
        seconds, stopped = in_rounds(measure, scale.rounds)
        why |= not_started | stopped
        for name in group.rows:
            row = {"row": name} | group.labels
            if name in why:
                row["failed"] = why[name]
            else:
                row |= time_of(seconds[name], seconds.get("plain"))
                with contextlib.suppress(Exception):  # the times are worth more than this count
                    row["peak_bytes"] = peak_bytes(programs[number, name][1])
            results.append(row)
        labels = "".join(f"{name} {value}: " for name, value in group.labels.items())
        say(f"{labels}timed {len(seconds)} rows in {time.perf_counter() - begin:.0f} s")
    return results


# Problems -----------------------------------------------------------------------------------------


def dense_problem(width: int, dtype: str, size: int) -> Problem:
    model = MODELS["dense"]._replace(make=partial(dense, width=width))
    losses_fn, params, batch = as_problem(model, size)

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def losses_in_dtype(params, batch):
        return losses_fn(*jax.tree.map(cast, (params, batch))).astype(jnp.float32)

    return Problem(losses_in_dtype, params, batch)


def vision_problem(make: Callable[..., Any], dtype: str, size: int) -> Problem:
    """Return an image model in training mode; the running statistics of BatchNorm are dropped."""
    model, images = make(CLASSES, dtype=jnp.dtype(dtype)), image_batch(size)
    batch = {"image": jnp.asarray(scaled(images["image"])), "label": jnp.asarray(images["label"])}
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), batch["image"][:1])
    rest = {name: value for name, value in variables.items() if name != "params"}

    def losses_fn(params, batch):
        variables = {"params": params} | rest
        logits, _ = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    return Problem(losses_fn, variables["params"], batch)


def image_batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random images of CIFAR's shape and dtype, on the host."""
    rng = np.random.default_rng(seed)
    image = rng.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(CLASSES, size=size, dtype=np.int32)}


def scaled(image: Any) -> Any:
    """Scale bytes to -1 to 1."""
    return (image / np.float32(127.5) - 1).astype(np.float32)


def language_problem(size: Size, dtype: str, examples: int) -> Problem:
    device = jax.devices()[0]
    task = make_task(size, optax.identity(), devices=[device], dtype=jnp.dtype(dtype))
    params = jax.device_put(task.init(jax.random.key(0)).params, device)
    apply_fn = task.state.apply_fn

    def losses_fn(params, batch):
        return losses_of(apply_fn(params, batch["tokens"][:, :-1]), batch["tokens"][:, 1:])

    return Problem(losses_fn, params, {"tokens": tokens_of(size, examples)})


def tokens_of(size: Size, examples: int) -> jax.Array:
    """Return random tokens."""
    shape = examples, size.length + 1
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(size.vocabulary, size=shape, dtype=np.int32))


# Parts --------------------------------------------------------------------------------------------


def load_recorded() -> Any:
    """Import tests/support/problem.py, which is on no path: the problem of the recorded runs."""
    spec = importlib.util.spec_from_file_location("problem", SUPPORT / "problem.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fidelity(scale: Scale) -> list[dict]:
    """Replay recorded trajectories, which are in float64, in float32 on the device."""
    problem = load_recorded()
    data, params = problem.make(np.float32)
    # The microbatches of the recorded mSAM are strided, those of samx contiguous.
    order = np.arange(len(data["y"])).reshape(-1, 4, 4).swapaxes(1, 2).ravel()
    strided = jax.tree.map(lambda x: x[order], data)
    starts, lower = {}, {}

    def lower_step(name, precision):
        batches = [
            problem.batch_at(strided if name.startswith("msam") else data, t)
            for t in range(problem.STEPS)
        ]
        tx = TRAJECTORIES[name](jax.eval_shape(lambda: batches[0]))
        tx = optax.with_extra_args_support(tx)
        starts[name] = tx.init(params), batches
        with jax.default_matmul_precision(precision):
            return [jax.jit(problem.make_step(tx)).lower(params, starts[name][0], batches[0])]

    for name, precision in itertools.product(scale.trajectories, ("highest", "default")):
        lower[name, precision] = partial(lower_step, name, precision)
    programs, failed = compile_all(lower)

    def difference(name, precision):
        expected, _ = problem.load(name)
        (state, batches), found, step = starts[name], params, programs[name, precision][0]
        differences = []
        for t, batch in enumerate(batches):
            found, state = step(found, state, batch)
            differences += [np.abs(found[key] - expected[key][t]).max() for key in found]
        largest = max(np.abs(expected[key]).max() for key in found)
        return float(np.max(differences) / largest)  # a NaN stays one

    results = []
    for name in scale.trajectories:
        row: dict[str, Any] = {"row": name}
        try:
            for precision in ("highest", "default"):
                if (name, precision) in failed:
                    row["failed"] = failed[name, precision]
                else:
                    row[precision] = difference(name, precision)
            row["passed"] = row.get("highest", math.nan) < TOLERANCE
        except Exception as error:
            row["failed"] = described(error)
        results.append(row)
    return results


def memory(scale: Scale) -> list[dict]:
    """Count the memory of a step of the language model: both compilers', and what was allocated.

    The prediction is that of `language_model.py --abstract` for one device, without remat. The
    allocator knows only the largest use so far. A row that is not above it has none.
    """
    size, examples = scale.language
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    makes = shapes.methods(VARIANTS)

    @cache  # the device may be the CPU
    def lowered_on(place, name):
        task, batch = shapes.task_of(
            size, makes[name], devices=[place], examples=examples, remat=False
        )
        return task, task.step.lower(task.state, batch)

    def lower(name, where):
        task, step = lowered_on(device if where == "device" else cpu, name)
        if where == "prediction":
            return [SimpleNamespace(compile=partial(step.compile, shapes.OPTIONS))]
        return [step, task.init.lower(jax.random.key(0))]

    keys = list(itertools.product(scale.held, ("device", "prediction")))
    programs, failed = compile_all({key: partial(lower, *key) for key in keys})
    batch = {"tokens": tokens_of(size, examples), "index": jnp.arange(examples, dtype=jnp.int32)}
    results = []
    for name in scale.held:
        row: dict[str, Any] = {"row": name}
        for key in keys:
            if key[0] == name and key in failed:
                row["failed"] = failed[key]
        if "failed" not in row:
            step, init = programs[name, "device"]
            row["predicted_bytes"] = peak_bytes(programs[name, "prediction"][0])
            row["compiled_bytes"] = peak_bytes(step)
            try:
                before = allocated_bytes(device)
                place = lowered_on(device, name)[0].batch_sharding
                state = init(jax.random.key(0))
                for _ in range(WARM_UP):
                    state, _ = step(state, jax.device_put(batch, place))
                jax.block_until_ready(state)
                del state
                after = allocated_bytes(device)
                row["allocated_bytes"] = after if after > before else None
            except Exception as error:
                row["failed"] = described(error)
        results.append(row)
    return results


def allocated_bytes(device: Any) -> int:
    """Return the largest number of bytes in use so far; 0 if the device does not say it."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def steps(part: Steps, scale: Scale) -> list[dict]:
    """Time the plain step, SAM without samx, and variants."""
    make, size = scale.models[part.model]
    problem = make(part.dtype, size)
    return time_groups([group_of(problem, part.rows)], scale)


def sampa_by_size(model: str, scale: Scale) -> list[dict]:
    """Time SAMPa's gradients in one call and one by one, over batch sizes."""
    sizes = scale.sizes[model]
    losses_fn, params, largest = scale.models[model][0]("float32", max(sizes))
    groups = []
    for size in sizes:
        batch = jax.tree.map(lambda x, size=size: x[:size], largest)
        groups.append(group_of(Problem(losses_fn, params, batch), ("plain", *PAIR), batch=size))
    return time_groups(groups, scale)


def async_on_two(scale: Scale) -> list[dict]:
    """Time AsyncSAM on the device and the CPU; the last row is the calibrated ascent batch."""
    model, size, count = scale.async_sam
    losses_fn, params, batch = scale.models[model][0]("float32", size)
    batch = jax.device_get(batch)  # as from a data loader
    devices = jax.devices()[0], jax.devices("cpu")[-1]

    def loss(params, batch):
        return losses_fn(params, batch).mean()

    one, other = devices
    found = samx.asynchronous.calibrate_ascent_batch(
        jax.grad(loss), params, batch, descent_device=one, ascent_device=other
    )
    say(f"calibrated: {found.size} of {size} examples")
    rows = make_rows(loss, params, batch, found.size, devices)
    _, failed = in_rounds({name: partial(timed, row, WARM_UP) for name, row in rows.items()}, 1)
    ready = {name: partial(timed, row, count) for name, row in rows.items() if name not in failed}
    seconds, stopped = in_rounds(ready, scale.rounds)
    failed |= stopped
    results = summarized({name: seconds[name] for name in rows if name in seconds})
    for row in results:
        middle, low, high = row["ratio"]
        row["ratio"] = [low, middle, high]
    results += [{"row": name, "failed": reason} for name, reason in failed.items()]
    about = found._asdict() | {"text": describe_ascent_batch(found)}
    return [*results, {"row": "calibration"} | about]


def images(scale: Scale) -> list[dict]:
    """Time training steps of an image model with batches from the host, as cifar.py takes them."""
    make, sizes = scale.images
    keys = list(itertools.product(sizes, scale.image_dtypes, FED))
    batches = {size: [image_batch(size, seed) for seed in range(4)] for size in sizes}

    def state_of(model, tx, key):
        variables = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)
        return samx.flax.TrainState.create(
            **{"apply_fn": model.apply, "params": variables["params"], "tx": tx},
            batch_stats=variables["batch_stats"],
        )

    def lower(size, dtype, name):
        setting = Setting(batches[size][0], size, num_examples=size)
        tx = VARIANTS[FED[name]].make(RHO, BASES["momentum"](LEARNING_RATE), setting)
        init = partial(state_of, make(CLASSES, dtype=jnp.dtype(dtype)), tx)
        state = jax.eval_shape(init, jax.random.key(0))
        step = jax.jit(image_step, donate_argnums=0).lower(state, batches[size][0])
        return [jax.jit(init).lower(jax.random.key(0)), step]

    def runner(key):
        init, step = programs[key]
        state, data = init(jax.random.key(0)), itertools.cycle(batches[key[0]])

        def advance():
            nonlocal state
            state, loss = step(state, jax.device_put(next(data)))
            return state, loss

        return Runner(advance, scale.least_seconds)

    programs, failed = compile_all({key: partial(lower, *key) for key in keys})
    results = []
    for size, dtype in itertools.product(sizes, scale.image_dtypes):
        mine = [key for key in keys if key[:2] == (size, dtype)]
        runners, why = started({k[2]: partial(runner, k) for k in mine if k in programs})
        measure = {name: one.seconds for name, one in runners.items()}
        seconds, stopped = in_rounds(measure, scale.rounds)
        why |= stopped | {key[2]: failed[key] for key in mine if key in failed}
        for name in FED:
            row: dict[str, Any] = {"row": name, "dtype": dtype, "batch": size}
            if name in why:
                row["failed"] = why[name]
            else:
                row |= time_of(seconds[name], seconds.get("plain"))
                row["images_per_second"] = 1e3 * size / row["ms"]
            results.append(row)
    return results


def image_step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
    """Take a training step; BatchNorm's statistics come from the clean pass."""

    def value_fn(params):
        logits, moved = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            scaled(batch["image"]),
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), moved["batch_stats"]

    (value, batch_stats), grads = jax.value_and_grad(value_fn, has_aux=True)(state.params)
    keywords = {"value_fn": value_fn, "batch_stats": batch_stats}
    return state.apply_gradients(grads=grads, value=value, **keywords), value
