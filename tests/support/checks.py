"""What every row of the table must pass: its oracle, and what the contract says about any variant.

A row is compiled once, in float64. All that the checks vary is an argument of that program: the
hyperparameters, their slopes as schedules, learning rate and momentum of the base, and a factor of
the loss.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import recorded
import reference
from cases import VARIANTS, Case

import samx

SLOPE = 0.1  # of a schedule, per step, relative to its first value
MOMENTUM = 0.9  # of the base
RATES = ("learning_rate", "max_learning_rate")
MOST_STEPS_BETWEEN = 7  # from one sharp step to the next, in any row


@dataclass(frozen=True)
class Program:
    """A row's compiled step, and the runs that the checks look at."""

    case: Case
    state: Any
    step: Callable[..., Any]

    def run(self, steps, numbers=None, slopes=None, rate=0.1, factor=1.0, start=None):
        """Return `(params, state)` after every step.

        Args:
            steps: Number of steps.
            numbers: Hyperparameters that differ from the row's; a function `step -> numbers` for
                other ones at each step.
            slopes: Relative growth per step of hyperparameters that are schedules.
            rate: Learning rate of the base; 0 also holds for variants that are the optimizer.
            factor: Of all losses; a number, or a list with one per step.
            start: `(params, state)` to go on from.
        """
        carry, history = start or (problem.make()[1], self.state), []
        slopes = dict.fromkeys(self.case.hyper, 0.0) | (slopes or {})
        for t in range(steps):
            changed = numbers(t) if callable(numbers) else numbers or {}
            hyper = self.case.hyper | changed
            if rate == 0:
                hyper |= {key: 0.0 for key in RATES if key in hyper}
            scale = factor[t] if isinstance(factor, list) else factor
            batch = batches()[t % len(batches())]
            carry = self.step(*carry, batch, hyper, slopes, rate, scale, MOMENTUM)
            history.append(carry)
        return history


@functools.cache
def batches():
    """The batches of an epoch; a row takes hundreds of steps."""
    data, _ = problem.make()
    return [problem.batch_at(data, t) for t in range(4)]


def arguments(case, numbers, slopes):
    """Return the hyperparameters: schedules where the row takes them, numbers elsewhere."""
    return {
        name: functools.partial(ramp, value, slopes[name]) if name in case.schedules else value
        for name, value in numbers.items()
    }


def ramp(first, slope, step):
    return first * (1.0 + slope * step)


@functools.cache
def program(name) -> Program:
    """Compile the step of a row."""
    case, (data, params) = VARIANTS[name], problem.make()
    batch_like = problem.batch_at(data, 0)

    @jax.jit
    def step(params, state, batch, numbers, slopes, rate, factor, momentum):
        base = optax.chain(optax.zero_nans(), optax.sgd(rate, momentum=momentum))
        tx = case.build(base, batch_like=batch_like, **arguments(case, numbers, slopes))
        tx = samx.all_readings(tx)

        def losses_fn(params, batch):
            return factor * problem.losses_fn(params, batch)

        def ascent_fn(params):
            return factor * (problem.losses_fn(params, batch) ** 2).mean()

        def loss_on_logits(logits, batch):
            return factor * problem.loss_on_logits(logits, batch)

        others = {"ascent_fn": ascent_fn, "apply_fn": problem.logits_of}
        others["loss_on_logits"] = loss_on_logits
        others |= {"features_fn": problem.features_of, "head_fn": problem.head_on}
        return problem.make_step(tx, losses_fn, **others)(params, state, batch)

    flat = dict.fromkeys(case.hyper, 0.0)
    base = optax.chain(optax.zero_nans(), optax.sgd(0.1, momentum=MOMENTUM))
    tx = case.build(base, batch_like=batch_like, **arguments(case, case.hyper, flat))
    return Program(case, samx.all_readings(tx).init(params), step)


def trajectory(history):
    """Stack the parameters after every step."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[params for params, _ in history])


def readings(carry):
    return optax.tree.get(carry[1], "readings")


def largest_difference(a, b):
    """Return the largest difference of two numbers at the same place; NaN differs from all."""

    def difference(x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        apart = np.abs(np.subtract(x, y, where=x != y, out=np.zeros_like(x)))
        return np.nan_to_num(apart, nan=np.inf).max(initial=0.0)

    pairs = zip(*(jax.tree.leaves(problem.as_numbers(tree)) for tree in (a, b)), strict=True)
    return max(float(difference(x, y)) for x, y in pairs)


def assert_finite(tree):
    for leaf in jax.tree.leaves(problem.as_numbers(tree)):
        assert np.isfinite(np.asarray(leaf, float)).all()


def without_sharp_loss(state):
    """Clear the readings that are infinite if no step was sharp."""
    cleared = optax.tree.get(state, "readings")._replace(sharp_loss=0.0, sharpness=0.0)
    return optax.tree.set(state, readings=cleared)


def own_program(name, run):
    """Return state and step of the row's program with a run's numbers, if it differs in no more."""
    case = VARIANTS[name]
    known = inspect.signature(case.factory).parameters
    numbers = {key: p.default for key, p in known.items() if key in case.hyper} | run.arguments
    is_usual = run.make is problem.make and run.further is recorded.nothing_further
    momentum = {None: MOMENTUM, recorded.MOMENTUM: MOMENTUM, recorded.SGD: 0.0}.get(run.base)
    is_usual &= momentum is not None
    is_usual &= numbers.keys() == case.hyper.keys()
    if not is_usual or not all(isinstance(number, float) for number in numbers.values()):
        return None
    flat, row = dict.fromkeys(numbers, 0.0), program(name)

    def step(params, state, batch, index):
        del index  # no such run has a table of its examples
        return row.step(params, state, batch, numbers, flat, 0.1, 1.0, momentum)

    return row.state, step


# ---- The checks: functions of the name of a row.


def follows_its_oracle(name):
    """A recorded run of the authors' code, or an independent loop with the row's own numbers."""
    case = VARIANTS[name]
    assert case.oracle
    for oracle in case.oracle:
        if isinstance(oracle, str):
            run = recorded.RECORDED[oracle]
            own = functools.partial(own_program, name, run)
            recorded.check(oracle, case.make(run.base, run.arguments), own)
        else:
            expected = oracle(reference.SGD(0.1, 0.9), 12)
            recorded.assert_same(trajectory(program(name).run(12)), expected)


def stays_finite_at_a_zero_gradient(name):
    """From the start and behind ordinary steps nothing is NaN; from the start nothing moves."""
    history = program(name).run(2, factor=0.0)
    params, state = history[-1]
    assert_finite((params, without_sharp_loss(state)))
    assert largest_difference(params, problem.make()[1]) == 0
    if not VARIANTS[name].is_noisy:
        assert float(readings(history[-1]).perturbation_norm) == 0
    for params, state in program(name).run(5, factor=[1.0, 1.0, 0.0, 0.0, 1.0]):
        assert_finite((params, without_sharp_loss(state)))


def recovers_from_a_bad_batch(name):
    """One step is not a number, and the base gets zeros: no state remembers it for ever."""
    if any(key in VARIANTS[name].hyper for key in RATES):
        return  # it takes a step itself, which the base cannot clear
    factors = [1.0] * (2 * MOST_STEPS_BETWEEN)
    for bad in (1, 2, 3):
        factors[bad] = np.nan
        for params, state in program(name).run(len(factors), factor=factors)[-2:]:
            assert_finite((params, without_sharp_loss(state)))
        factors[bad] = 1.0


def takes_the_same_steps_at_any_scale_of_the_loss(name):
    """The loss times 2^±560, whose square is out of range, at a learning rate of 2^∓560.

    Some rows step otherwise for twice the loss, by design or by an epsilon of the authors' code.
    They only stay finite.
    """
    steps = 4

    def run(factor):
        numbers = dict(VARIANTS[name].hyper)
        if VARIANTS[name].shape != "optimizer" and "learning_rate" in numbers:
            numbers["learning_rate"] /= factor
        return program(name).run(steps, numbers, rate=0.1 / factor, factor=factor)

    usual = trajectory(run(1.0))
    is_free = largest_difference(trajectory(run(2.0)), usual) < 1e-13
    for factor in (2.0**-560, 2.0**560):
        found = trajectory(run(factor))
        if VARIANTS[name].survives_any_scale:
            assert_finite(found)
        assert not is_free or largest_difference(found, usual) < 1e-9, factor


def follows_schedules(name):
    """A schedule gives each step what a number gives that has its value; no number is unread."""
    case, steps = VARIANTS[name], 1 + MOST_STEPS_BETWEEN
    constant = program(name).run(steps)
    if case.schedules:
        slopes = dict.fromkeys(case.schedules, SLOPE)

        def numbers(t):
            return {key: ramp(case.hyper[key], SLOPE, t) for key in case.schedules}

        scheduled = program(name).run(steps, slopes=slopes)
        by_hand = program(name).run(steps, numbers=numbers)
        assert largest_difference(trajectory(scheduled), trajectory(by_hand)) < 1e-11
    for key in case.hyper:  # the state too: another threshold may lead to the same decisions
        if key in case.schedules:
            changed = program(name).run(steps, slopes={key: SLOPE})
        else:
            changed = program(name).run(steps, numbers={key: case.hyper[key] / 2})
        assert largest_difference(changed[-1], constant[-1]) > 1e-9, key


def has_its_limit_without_a_radius(name):
    """With a radius of 0 nothing is perturbed, and the steps are those of the limit."""
    case = VARIANTS[name]
    radii = {key: 0.0 for key in case.radii if key in case.hyper}
    if not radii:
        return
    history = program(name).run(8, numbers=radii)
    for carry in history:
        assert float(readings(carry).perturbation_norm) == 0
        assert_finite((carry[0], without_sharp_loss(carry[1])))
        if case.climbs and readings(carry).is_sharp:
            np.testing.assert_allclose(readings(carry).sharp_loss, readings(carry).loss, rtol=1e-12)
    if case.limit is not None:
        expected = case.limit(reference.SGD(0.1, 0.9), 8)
        recorded.assert_same(trajectory(history), expected, 1e-11)


def stays_at_a_learning_rate_of_zero(name):
    history = program(name).run(8, rate=0.0)
    assert largest_difference(history[-1][0], problem.make()[1]) == 0


def reads_what_it_did(name):
    """The readings: losses, lengths, the cosine, what was spent, whether the step was sharp."""
    case, spent, are_sharp, params = VARIANTS[name], 0.0, [], problem.make()[1]
    start = optax.tree.get(program(name).state, "readings")
    assert not bool(start.is_sharp)
    assert float(start.gradients_spent) == 0
    for t, carry in enumerate(program(name).run(6)):
        found, batch = readings(carry), problem.batch_at(problem.make()[0], t)
        are_sharp.append(bool(found.is_sharp))
        spent += case.spent_at(t, carry[1]) if found.is_sharp else 1
        np.testing.assert_allclose(found.gradients_spent, spent, rtol=1e-6)
        assert float(optax.tree.get(carry[1], "sharp_loss")) == float(found.sharp_loss)
        share = optax.tree.get(carry[1], "sharp_fraction", np.mean(are_sharp))
        np.testing.assert_allclose(share, np.mean(are_sharp), rtol=1e-6)
        if case.climbs:
            loss, grads = mean_loss_and_grad(params, batch)
            np.testing.assert_allclose(found.loss, loss, rtol=1e-6)
            np.testing.assert_allclose(found.grad_norm, reference.global_norm(grads), rtol=1e-6)
        if not found.is_sharp:
            assert float(found.sharp_loss) == float(found.sharpness) == float("inf")
            assert float(found.perturbation_norm) == float(found.cosine) == 0
        elif not case.perturbs:
            assert float(found.perturbation_norm) == float(found.cosine) == 0
            assert float(found.sharpness) > 0
            rise = found.sharp_loss - found.loss
            np.testing.assert_allclose(found.sharpness, rise, rtol=1e-9, atol=1e-12)
        elif case.climbs or t > 0:
            assert float(found.perturbation_norm) > 0
            assert 0 < abs(float(found.cosine)) <= 1 + 1e-6
        if found.is_sharp and case.climbs:
            assert float(found.cosine) > 0
            assert float(found.sharp_loss) > float(found.loss)
            rise = found.sharp_loss - found.loss
            np.testing.assert_allclose(found.sharpness, rise, rtol=1e-9, atol=1e-12)
        params = carry[0]
    assert set(are_sharp) == ({True, False} if case.is_gated else {True})


@jax.jit
def mean_loss_and_grad(params, batch):
    return jax.value_and_grad(lambda p: problem.losses_fn(p, batch).mean())(params)


def keeps_dtypes(name):
    """Updates and state keep shapes and dtypes, also with numbers wider than the parameters."""
    case, (params, state) = VARIANTS[name], program(name).run(1)[0]
    assert signature((params, state)) == signature((problem.make()[1], program(name).state))
    data, params = problem.make(jnp.bfloat16)
    batch = problem.batch_at(data, 0)
    wide = {key: jnp.asarray(value, jnp.float64) for key, value in case.hyper.items()}
    tx = case.build(batch_like=batch, **wide)
    before = params, jax.eval_shape(tx.init, params)
    assert signature(jax.eval_shape(problem.make_step(tx), *before, batch)) == signature(before)


def signature(tree):
    """Return shapes and dtypes. If they change between steps, the program is compiled again."""
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, getattr(x, "weak_type", False)), tree)


CHECKS = (
    follows_its_oracle,
    stays_finite_at_a_zero_gradient,
    recovers_from_a_bad_batch,
    takes_the_same_steps_at_any_scale_of_the_loss,
    follows_schedules,
    has_its_limit_without_a_radius,
    stays_at_a_learning_rate_of_zero,
    reads_what_it_did,
    keeps_dtypes,
)
