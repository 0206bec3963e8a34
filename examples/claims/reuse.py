"""Train with a sampled, reused and mixed second-order part of SAM's gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import samx
from examples.claims.grid import Outcome, Run
from examples.common.digits_task import STEPS_PER_EPOCH, TRAIN, rows_of, shuffled
from examples.common.rounding import rounded
from examples.common.training import cosine_decay, data_of, make_functions, start_of
from samx import policies
from samx.combinations import decaying

PARTS = 10  # of a training; after each of them the second-order part is measured
MEASURED = 5  # batches of it


class Arm(NamedTuple):
    """A way to sample the second-order part of SAM's gradient, and to reuse it.

    Attributes:
        kind: One of `KINDS`.
        share: Share of the steps that sample it: 1 is SAM, 0 the base optimizer. For `random`.
        decay: Its factor from one step to the next: 0 reuses nothing, 1 all of it. For `random`.
        window: Steps in a window of the controller; the next ones are the controller's too.
        blocks: Of a window.
        gain: Both gains.
        max_fraction: Largest share of a window.
        warmup: First steps, which all sample.
    """

    kind: str = "random"
    share: float = 1.0
    decay: float = 0.7
    window: int = 50
    blocks: int = 5
    gain: float = 0.13
    max_fraction: float = 0.8
    warmup: int = 50


def random(arm: Arm, rho: Any, key: Any) -> Any:
    """Return ARSAM without a controller: every step draws whether it samples."""
    policy = policies.random(arm.share, key)
    return samx.arsam(rho, policy=policy, mixing=decaying(arm.decay))


def quota_of(arm: Arm, key: Any) -> policies.Policy:
    """Return the controller of vSAM."""
    return policies.quota(
        arm.window,
        num_blocks=arm.blocks,
        max_fraction=arm.max_fraction,
        ratio_gain=arm.gain,
        variance_gain=arm.gain,
        warmup_steps=arm.warmup,
        key=key,
    )


KINDS: dict[str, Callable[[Arm, Any, Any], Any]] = {
    "random": random,
    "vsam": lambda arm, rho, key: samx.vsam(rho, policy=quota_of(arm, key)),
    "arsam": lambda arm, rho, key: samx.arsam(rho, policy=quota_of(arm, key)),
    "ausam": lambda arm, rho, key: samx.ausam(rho, 0.5, TRAIN, key=key),
}


def straight_through(bits: int) -> Callable[[Any], Any]:
    """Return the function that rounds weights, and has the gradient of the identity."""

    def merge(params):
        change = jax.tree.map(jnp.subtract, rounded(params, bits), params)
        return jax.tree.map(lambda w, c: w + jax.lax.stop_gradient(c), params, change)

    return merge


class Task(NamedTuple):
    """What is trained: 1000 examples in batches of 100.

    Attributes:
        losses_fn: `(params, batch) -> losses`.
        score: `(params, split) -> (score, other numbers)`; higher is better.
        start: The first parameters of a seed.
        data: The training, validation and test split of a seed.
        bits: Bits to which the weights are rounded in every step; 0: they are not.
    """

    losses_fn: Callable[..., Any]
    score: Callable[..., Any]
    start: Callable[[int], Any]
    data: Callable[[int], Any]
    bits: int = 0


def digits(noise: float, width: int, bits: int = 0) -> Task:
    """Return the task of digits.py, with this share of wrong labels."""
    start = functools.partial(start_of, width=width)
    data = functools.partial(data_of, noise=noise)
    return Task(make_functions(width).losses_fn, digits_score(width), start, data, bits)


@functools.cache
def digits_score(width: int) -> Callable[..., Any]:
    """Return the function of the test accuracy in percent."""
    accuracy = make_functions(width).accuracy
    return lambda params, data: (100 * accuracy(params, data), {})


@functools.lru_cache(maxsize=16)
def program(
    static: Arm,
    losses_fn: Callable[..., Any],
    score: Callable[..., Any],
    bits: int,
    is_measured: bool,
) -> Callable[..., Outcome]:
    """Compile a training: `(arm, run, epochs of a part, params, splits) -> Outcome`.

    The arm that is given there replaces `share`, `decay` and `gain` of the static one.
    """
    merge = straight_through(bits) if bits else lambda params: params

    def of_run(arm, run, epochs, params, train, validation, test):
        arm = static._replace(share=arm.share, decay=arm.decay, gain=arm.gain)
        inner = KINDS[arm.kind](arm, run.rho, jax.random.fold_in(jax.random.key(2), run.seed))
        inner = samx.on_merged(inner) if bits else inner
        rate = cosine_decay(run.learning_rate, PARTS * epochs * STEPS_PER_EPOCH)
        tx = optax.chain(inner, optax.sgd(rate, momentum=0.9))

        def closures(rows):
            batch = rows_of(train, rows)
            extra = {"losses_fn": losses_fn, "batch": batch, "index": batch["index"]}
            extra |= {"merge_fn": merge} if bits else {}
            return extra | {"value_fn": lambda params: losses_fn(params, batch).mean()}

        def step(carry, rows):
            params, state = carry
            extra = closures(rows)
            value, g = jax.value_and_grad(lambda w: extra["value_fn"](merge(w)))(params)
            updates, state = tx.update(g, state, params, value=value, **extra)
            return (optax.apply_updates(params, updates), state), None

        def epoch(index, carry):
            return jax.lax.scan(step, carry, shuffled(run.seed, index))[0]

        def part(carry, index):
            carry = jax.lax.fori_loop(index * epochs, (index + 1) * epochs, epoch, carry)
            if not is_measured:
                return carry, (jnp.zeros(1), jnp.zeros(1))
            batches = shuffled(run.seed, (index + 1) * epochs)[:MEASURED]
            measure = functools.partial(second_order, run.rho, merge(carry[0]))
            return carry, jax.lax.map(lambda rows: measure(closures(rows)["value_fn"]), batches)

        start = params, tx.init(params)
        (params, state), measured = jax.lax.scan(part, start, jnp.arange(PARTS))
        (chosen_by, _), (found, more) = (score(merge(params), data) for data in (validation, test))
        spent = optax.tree.get(state, "gradients_spent")
        share = spent / (PARTS * epochs * STEPS_PER_EPOCH) - 1
        length, ratio = (each.mean(axis=1) for each in measured)
        return Outcome(chosen_by, found, share, more | {"length": length, "ratio": ratio})

    return jax.jit(of_run)


def second_order(rho: Any, params: Any, value_fn: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return ‖h‖ and ‖h‖ / ‖g‖ at the parameters, for h = g_s − g."""
    tx = samx.arsam(rho, policy=policies.every(1))
    value, g = jax.value_and_grad(value_fn)(params)
    _, state = tx.update(g, tx.init(params), params, value=value, value_fn=value_fn)
    return optax.tree.get(state, "part_norm"), optax.tree.get(state, "part_ratio")


def trainer(arm: Arm, task: Task, steps: int, is_measured: bool = True) -> Callable[[Run], Outcome]:
    """Return the function that trains one `Run` of an arm for so many steps, in `PARTS` parts.

    Without `is_measured`, it takes the time of the training alone.
    """
    epochs, rest = divmod(steps, PARTS * STEPS_PER_EPOCH)
    if rest:
        raise ValueError(f"steps must be a multiple of {PARTS * STEPS_PER_EPOCH}, got {steps}")
    static = arm._replace(share=0.0, decay=0.0, gain=0.0)
    train = program(static, task.losses_fn, task.score, task.bits, is_measured)

    def of_run(run: Run) -> Outcome:
        seed = int(run.seed)
        return train(arm._replace(kind=0), run, epochs, task.start(seed), *task.data(seed))

    return of_run
