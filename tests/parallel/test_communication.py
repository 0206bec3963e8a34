"""What each device computes and sends, read from the compiled programs of 8 simulated devices."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import regimes
from cases import CLOSURES, VARIANTS
from costs import STRAIGHT, flops, wide_losses, wide_problem
from costs import build as build_variant
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import samx
from examples.common.programs import communicated_bytes
from samx.perturbations import metric_ball, subtract_ema

# One row for each set of closures, and one that needs the mean gradient too.
PROGRAMS = [n for n in STRAIGHT if n in CLOSURES or n == "gsam"]
EXCHANGED = {"saf": 4 * 4}  # bytes for each example: its position, and three logits
SCALARS = 64  # bytes of losses, norms and shares in a step
MOMENTUM = optax.sgd(0.1, momentum=0.9)
BALLS = {
    "ball": metric_ball(0.1),
    "average": optax.chain(subtract_ema(1.0, 0.9), metric_ball(0.1)),  # its state takes a gradient
}


def large_problem():
    """A larger batch, so that products dominate the cost on each of 8 devices, too."""
    params, batch = wide_problem()
    return params, jax.tree.map(lambda x: jnp.concatenate([x] * 8), batch)


def parameter_bytes():
    return sum(leaf.nbytes for leaf in jax.tree.leaves(wide_problem()[0]))


def paired(batch_like):
    return samx.sampa(MOMENTUM, batch_like=batch_like, pair_sharding=P("pair"))


def build(name):
    if name == "plain":
        return lambda batch_like: optax.with_extra_args_support(MOMENTUM)
    if name == "pair":
        return paired
    if name == "diag_sq":
        return lambda batch_like: samx.lets(MOMENTUM, hessian="diag_sq")
    if name.startswith("msam "):
        _, how, ball = name.split()
        tx = samx.msam(num_microbatches=4, how=how, perturbation=BALLS[ball])
        return lambda batch_like: optax.chain(tx, MOMENTUM)
    if name.startswith("accumulated "):
        whole = build(name.removeprefix("accumulated "))
        return lambda batch_like: samx.accumulate(whole(batch_like), 4)
    return lambda batch_like: build_variant(name, MOMENTUM, batch_like)


@functools.cache
def compiled(name, regime, ascent="global", shape=(8,), check_vma=True, returns_value=False):
    """Compile a step that returns state and readings, too; axes are "data", "pair" or both."""
    params, batch = large_problem()
    names = ("pair", "data")[: len(shape)] if name == "pair" else ("data",)
    axes = "data" if "data" in names else None
    spec = P(axes) if axes else P()
    axis_type = AxisType.Explicit if regime == "explicit" else AxisType.Auto
    mesh = regimes.mesh_of(shape, names, axis_type)
    with jax.set_mesh(mesh):
        batch = regimes.place(batch, mesh, spec)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
        )
        tx = build(name)(like)
        mapped = regime in ("shard_map", "pmap")
        if mapped and axes:
            tx = samx.data_parallel(tx, axes, ascent)
        specs = samx.state_specs(tx, params, batch_specs=spec)
        params = regimes.place(params, mesh, P())
        state = regimes.place(tx.init(params), mesh, specs)
        whole_step = regimes.make_step(tx, wide_losses, axes if mapped else None)

        def step(*args):
            params, state, value = whole_step(*args)
            # If a variant ignores its gradient, the value would keep a forward pass alive.
            return params, state, value if returns_value else None

        if mapped:
            step = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), specs, spec),
                out_specs=(P(), specs, P()),
                check_vma=check_vma,
            )
        return jax.jit(step).lower(params, state, batch).compile()


def gradients_of(name):
    """Count the gradients that are averaged over the devices, whichever examples they use."""
    case = VARIANTS[name]
    if "num_groups" in case.static_args:
        return 2
    if name == "lets":  # both losses at the new parameters are two numbers and two slopes
        return 3
    return case.passes[1] + case.uses_gradient + (case.curvature > 0)


@functools.cache
def one_pass(num_devices, direction="backward"):
    """Flops of one gradient, or a forward pass, on one device's share of the batch."""
    params, batch = large_problem()
    shard = jax.tree.map(lambda x: x[: len(x) // num_devices], batch)

    def loss(params):
        return wide_losses(params, shard).mean()

    fn = loss if direction == "forward" else jax.value_and_grad(loss)
    return flops(jax.jit(fn).lower(params).compile())


def share_of(name):
    """Flops of a step on one of 8 devices."""
    forward, backward = VARIANTS[name].passes
    alone = (forward - backward) * one_pass(8, "forward")
    gradients = backward + VARIANTS[name].uses_gradient + VARIANTS[name].curvature
    return alone + gradients * one_pass(8)


def assert_bytes(program, copies, of_examples=0):
    (operation, size), *others = communicated_bytes(program).items()
    assert (operation, others) == ("all-reduce", [])
    assert 0 <= size - copies * parameter_bytes() - of_examples <= SCALARS


@pytest.mark.parametrize(
    ("name", "regime", "check_vma"),
    [
        *((name, "shard_map", True) for name in PROGRAMS),
        *((name, "auto", True) for name in ("plain", "sam")),
        ("sam", "shard_map", False),
    ],
)
def test_one_all_reduce_and_the_flops_of_its_share_per_gradient(name, regime, check_vma):
    program = compiled(name, regime, check_vma=check_vma)
    copies = 1 if name == "plain" else gradients_of(name)
    assert_bytes(program, copies, EXCHANGED.get(name, 0) * len(large_problem()[1]["y"]))
    if name != "plain":
        assert flops(program) == pytest.approx(share_of(name), rel=0.05)


def test_a_skipped_step_sends_one_pass(monkeypatch):
    for side, copies in ((0, 2), (1, 1)):
        monkeypatch.setattr(jax.lax, "cond", lambda _, *sides, side=side: sides[side]())
        assert_bytes(compiled.__wrapped__("looksam", "shard_map"), copies)


@pytest.mark.parametrize(
    ("name", "check_vma", "copies"),
    [
        ("sam", False, 1),
        # One more where the mean gradient is needed, for a combination or a state.
        ("gsam", True, 2),
        ("lets", True, 2),
    ],
)
def test_local_ascent_sends_one_pass(name, check_vma, copies):
    assert_bytes(compiled(name, "shard_map", "local", check_vma=check_vma), copies)


@pytest.mark.parametrize("regime", ["shard_map", "auto"])
def test_a_device_draws_from_its_share(regime, monkeypatch):
    """AUSAM after its warm-up; a few numbers per example keep the score tables equal."""
    monkeypatch.setattr(jax.lax, "cond", lambda _, *sides: sides[1]())
    program = compiled.__wrapped__("ausam", regime)
    assert flops(program) == pytest.approx(one_pass(8), rel=0.05)
    sent = sum(communicated_bytes(program).values()) - 2 * parameter_bytes()
    assert 0 < sent <= 6 * 4 * len(large_problem()[1]["y"]) + SCALARS


@pytest.mark.parametrize(
    ("regime", "shape"),
    [("shard_map", (2,)), ("shard_map", (2, 4)), ("explicit", (2, 4))],
)
def test_a_pair_costs_one_pass(regime, shape):
    program = compiled("pair", regime, shape=shape)
    assert_bytes(program, 3 if len(shape) == 2 and regime != "shard_map" else 2)
    num_groups = shape[1] if len(shape) == 2 else 1
    assert flops(program) / one_pass(num_groups) == pytest.approx(1, abs=0.05)


def test_what_the_caller_computes_too_is_merged():
    """`samx.value_and_grad` and `data_parallel` compute the same gradient; XLA merges the two."""
    alone, returned = (compiled("sam", "shard_map", returns_value=value) for value in (False, True))
    assert flops(returned) == flops(alone)
    assert communicated_bytes(returned) == communicated_bytes(alone)


@pytest.mark.parametrize(
    ("name", "regime", "copies"),
    [
        ("diag_sq", "shard_map", 2),
        ("diag_sq", "auto", 2),
        ("diag_sq", "explicit", 2),
        # Accumulation has a custom VJP: LETS takes two gradients, and sends their slopes.
        ("accumulated diag_sq", "shard_map", 2),
    ],
)
def test_lets_sends_no_gradient_for_its_slopes(name, regime, copies):
    assert_bytes(compiled(name, regime), copies)


@pytest.mark.parametrize(("ascent", "copies"), [("global", 2), ("local", 1)])
def test_accumulation_sends_each_gradient_once(ascent, copies):
    """XLA counts the loop's body once: a quarter of the flops, and no pass over the whole batch."""
    program = compiled("accumulated sam", "shard_map", ascent)
    assert_bytes(program, copies)
    assert flops(program) / one_pass(8) == pytest.approx(2 / 4, rel=0.1)


@pytest.mark.parametrize(
    ("name", "ascent", "copies"),
    [
        ("msam vmap ball", "global", 4 + 1),
        ("msam vmap average", "global", 4 + 1),
        ("msam vmap ball", "local", 1),
        ("msam vmap average", "local", 2),
        ("msam scan ball", "global", 4 + 1),
        ("msam scan ball", "local", 1),
    ],
)
def test_msam_sums_before_it_averages(name, ascent, copies):
    assert_bytes(compiled(name, "shard_map", ascent, check_vma="ball" in name), copies)
