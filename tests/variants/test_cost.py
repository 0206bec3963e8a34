"""What a step costs: passes counted while it runs, flops and memory read from the program."""

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import KINDS, VARIANTS
from costs import (
    STRAIGHT,
    build,
    compiled,
    count_passes,
    flops,
    wide_losses,
    wide_problem,
)

import samx

# One row of each kind, and those that take other passes than SAM.
COUNTED = [n for n, case in VARIANTS.items() if n in KINDS or case.passes != (1, 1)]


@pytest.mark.parametrize("name", [n for n in COUNTED if n not in STRAIGHT])
def test_passes_inside_update(name):
    """In loops and branches, where no flops can be read. `checks.py` has their sum in readings."""
    case = VARIANTS[name]
    other = int(not case.uses_gradient)  # a step that is not sharp needs one gradient
    for t, (passes, state) in enumerate(count_passes(case.build(), 3)):
        is_sharp = optax.tree.get(state, "is_sharp")
        forward, backward = case.passes if is_sharp else (other, other)
        times = case.repeats(t)
        assert passes == {"forward": times * forward, "backward": times * backward}


def extra_gradients(tx, steps):
    """Count the gradients inside each `update` while it runs."""
    return [passes["backward"] for passes, _ in count_passes(tx, steps)]


def test_looksam_takes_a_fifth_of_a_gradient_more():
    assert extra_gradients(samx.looksam(0.05, period=5), 10) == [1, 0, 0, 0, 0] * 2


def flops_of(name):
    """Flops of all passes of a sharp step."""
    forward, backward = VARIANTS[name].passes
    alone = (forward - backward) * flops(compiled("forward"))
    gradients = backward + VARIANTS[name].uses_gradient + VARIANTS[name].curvature
    return alone + gradients * flops(compiled("gradient"))


@pytest.mark.parametrize("name", [n for n in STRAIGHT if n in COUNTED])
def test_flops_are_those_of_the_passes(name):
    """Where the incoming gradient is not read, the compiler removes it."""
    assert flops(compiled(name)) == pytest.approx(flops_of(name), rel=0.02)


def test_each_side_of_a_branch_alone(monkeypatch):
    """A skipped step costs one gradient, a sharp step two; XLA counts the more expensive side."""
    name = "rst"  # all policies share its branch
    gradient = flops(compiled("gradient"))
    assert flops(compiled(name)) / gradient == pytest.approx(2, rel=0.02)
    for side, gradients in ((0, 2), (1, 1)):
        monkeypatch.setattr(jax.lax, "cond", lambda _, *sides, side=side: sides[side]())
        alone = compiled.__wrapped__(name)
        assert flops(alone) / gradient == pytest.approx(gradients, rel=0.02)


def on_branch(name, branch, monkeypatch):
    """Compile the program with only one of its branches."""
    monkeypatch.setattr(jax.lax, "cond", lambda _, *sides: sides[branch]())
    monkeypatch.setattr(jax.lax, "switch", lambda _, branches: branches[branch]())
    return compiled.__wrapped__(name)


def test_ausam_takes_half_of_both_gradients_behind_its_warm_up(monkeypatch):
    for branch, gradients in ((0, 2), (1, 1)):
        program = on_branch("ausam", branch, monkeypatch)
        assert flops(program) == pytest.approx(gradients * flops(compiled("gradient")), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fisher_sparse_sam", "dynamic_sparse_sam"])
def test_a_mask_costs_nothing_but_where_it_is_made(name, monkeypatch):
    """A mask does not save anything either: both passes need all parameters."""
    sam = flops(compiled("sam"))
    assert flops(compiled(name)) > 1.03 * sam
    assert flops(on_branch(name, 1, monkeypatch)) == pytest.approx(sam, rel=0.005)


def test_esam_on_the_whole_batch_takes_no_forward_pass_more():
    def passes(**changes):
        (counted, _), *_ = count_passes(VARIANTS["esam"].build(**changes), 1)
        return counted["forward"], counted["backward"]

    assert passes(sharp_pass="whole") == passes(selected_fraction=1.0) == (2, 2)


@pytest.mark.parametrize(("how", "times"), [("vmap", 1), ("scan", 4)])
def test_msam_takes_both_gradients_of_every_example_once(how, times):
    """XLA counts the body of a loop once: one of four microbatches."""
    params, batch = wide_problem()
    tx = optax.chain(samx.msam(0.05, 4, how=how), optax.sgd(0.1, momentum=0.9))

    def step(params, state):
        g = jax.grad(lambda p: wide_losses(p, batch).mean())(params)
        updates, state = tx.update(g, state, params, losses_fn=wide_losses, batch=batch)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step).lower(params, tx.init(params)).compile()
    assert times * flops(program) == pytest.approx(2 * flops(compiled("gradient")), rel=0.05)


def test_msam_in_a_loop_needs_the_memory_of_one_microbatch():
    """Small layers and many examples: activations take most of the memory."""
    params, batch = deep_problem()
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 8), batch)

    def temporary(tx):
        def update(params, state, batch):
            return tx.update(params, state, params, losses_fn=deep_losses, batch=batch)

        program = jax.jit(update).lower(params, tx.init(params), batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    in_a_loop = temporary(samx.msam(0.05, 16))
    assert in_a_loop < 0.4 * temporary(samx.msam(0.05, 1))
    assert temporary(samx.msam(0.05, 16, how="vmap")) > in_a_loop


def deep_problem():
    """Four equal layers, one for each group."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {f"layer{i}": jax.random.normal(key, (64, 64)) / 8 for i, key in enumerate(keys)}
    return params, {"x": jnp.ones((256, 64)), "y": jnp.zeros(256, jnp.int32)}


def deep_losses(params, batch):
    hidden = batch["x"]
    for layer in params.values():
        hidden = jax.nn.relu(hidden @ layer)
    return optax.softmax_cross_entropy_with_integer_labels(hidden, batch["y"])


def test_a_quarter_of_the_layers_costs_less_work_and_less_memory(monkeypatch):
    params, batch = deep_problem()
    base = optax.sgd(0.1, momentum=0.9)

    def program(tx):
        def step(params, state):
            value, grads = jax.value_and_grad(lambda p: deep_losses(p, batch).mean())(params)
            closures = {"losses_fn": deep_losses, "batch": batch}
            updates, state = tx.update(grads, state, params, value=value, **closures)
            return optax.apply_updates(params, updates), state

        return jax.jit(step).lower(params, tx.init(params)).compile()

    def peak(program):
        memory = program.memory_analysis()
        return memory.temp_size_in_bytes

    sam = program(optax.chain(samx.sam(0.05), base))
    whole = program(samx.sl_sam(base, 0.05, groups=4))
    assert peak(whole) < peak(sam)
    branches = []
    for branch in range(4):
        monkeypatch.setattr(jax.lax, "switch", lambda _, sides, branch=branch: sides[branch]())
        alone = program(samx.sl_sam(base, 0.05, groups=4))
        branches.append(flops(alone) / flops(sam))
        assert peak(alone) < peak(sam)
    assert sum(branches) / 4 <= 0.75
    assert branches == sorted(branches, reverse=True)  # early layers need a longer backward pass
    assert flops(whole) / flops(sam) == pytest.approx(max(branches), rel=0.02)


@pytest.mark.parametrize("name", [n for n, case in VARIANTS.items() if case.copies is not None])
def test_size_of_the_state(name):
    params, batch = wide_problem()

    def size(tx):
        state = jax.eval_shape(tx.init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    base = optax.sgd(0.1, momentum=0.9)
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    extra = size(build(name, base, batch)) - size(base)
    assert 0 < extra - VARIANTS[name].copies * copy < 160  # readings, clocks and windows


@pytest.mark.parametrize(
    ("name", "copies", "donate"),
    [("sam", 1, False), ("gsam", 3, False), ("gsam", 3, True), ("wsam", 3, False)],
)
def test_memory_is_some_copies_of_the_parameters_above_the_plain_step(name, copies, donate):
    """GSAM needs two; the CPU compiler writes a factor of its norms out, in the shape of a leaf."""
    params, _ = wide_problem()
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def temporary(name):
        return compiled(name, donate=donate).memory_analysis().temp_size_in_bytes

    assert temporary(name) - temporary("plain") <= 1.01 * copies * copy


@pytest.mark.parametrize(("gradients", "calls"), [("vmap", 1), ("separate", 2)])
def test_sampa_takes_both_gradients_in_one_vectorized_call(gradients, calls):
    params, batch = wide_problem()
    tx, traced = samx.sampa(optax.sgd(0.1), batch_like=batch, gradients=gradients), []

    def losses_fn(params, batch):
        traced.append(None)
        return wide_losses(params, batch)

    state = tx.init(params)
    jax.eval_shape(lambda: tx.update(params, state, params, losses_fn=losses_fn, batch=batch))
    assert len(traced) == calls


def test_the_program_does_not_grow_with_the_ascent_steps():
    params, batch = wide_problem()

    def equations(ascent_steps):
        tx = samx.sharpness_aware(samx.perturbations.metric_ball(0.1), ascent_steps)
        state = tx.init(params)

        def value_fn(p):
            return wide_losses(p, batch).mean()

        return len(
            jax.make_jaxpr(lambda g: tx.update(g, state, params, value_fn=value_fn))(params).eqns
        )

    assert equations(2) == equations(20)
