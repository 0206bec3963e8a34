"""step_cost.py: passes counted while a step runs, branches one by one, and the table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import samx
from examples.common import choices, steps
from examples.common.programs import peak_bytes
from examples.common.registry import BASES, VARIANTS, Setting, Variant
from examples.cost import step_cost
from examples.cost.passes import Counter, Forks


def losses_fn(params, batch):
    return (batch["image"] @ params) ** 2


def make_problem():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    return jnp.arange(1.0, 4.0), {"image": image}


def first(batch, count):
    return jax.tree.map(lambda leaf: leaf[:count], batch)


def gradient(losses_fn, params, batch):
    return jax.grad(lambda p: losses_fn(p, batch).mean())(params)


def vectorized(fn, params, batch):
    return jax.vmap(lambda p: gradient(fn, p, batch))(jnp.stack([params, 2 * params]))


def vectorized_over_examples(fn, params, batch):
    one = jax.vmap(lambda x: gradient(fn, params, x))
    return one(jax.tree.map(lambda leaf: leaf[:, None], batch))


def three_in_a_loop(fn, params, batch):
    return jax.lax.fori_loop(0, 3, lambda _, p: p - 0.01 * gradient(fn, p, batch), params)


def half_after_a_look(fn, params, batch):
    losses = fn(params, batch)
    return gradient(fn, params, jax.tree.map(lambda leaf: leaf[losses.argsort()[:4]], batch))


PASSES = {  # forward and backward, in passes over a batch
    gradient: (1, 1),
    vectorized: (2, 2),
    vectorized_over_examples: (1, 1),
    three_in_a_loop: (3, 3),
    half_after_a_look: (1.5, 0.5),
    lambda fn, params, batch: fn(params, batch): (1, 0),
    lambda fn, params, batch: gradient(fn, params, first(batch, 2)): (0.25, 0.25),
}


@pytest.mark.parametrize("work", PASSES)
def test_counter_counts_passes_over_a_batch(work):
    params, batch = make_problem()
    counter = Counter(size=8)
    step = jax.jit(lambda params: work(counter.watch(losses_fn), params, batch))
    found = step(params)
    np.testing.assert_allclose(found, work(losses_fn, params, batch), rtol=1e-5)
    forward, backward = PASSES[work]
    assert counter.passes() == {"forward": forward, "backward": backward}
    counter.clear()
    assert counter.passes() == {"forward": 0, "backward": 0}
    jax.block_until_ready(step(params))
    assert counter.passes() == {"forward": forward, "backward": backward}


def test_passes_of_whole_steps(tiny_models, monkeypatch):
    """One variant of each kind. `tests/variants` counts the passes inside `update` for all."""
    monkeypatch.setattr(steps, "VARIANTS", VARIANTS)
    monkeypatch.setattr(step_cost, "reference_rows", lambda *args: {})  # the tiny run counts them
    counts = step_cost.count_passes("tiny", ["sam", "momentum-sam", "periodic", "rst"])
    share = counts["rst"]["branch_shares"][1]
    assert share == pytest.approx(0.5, abs=0.15)
    expected = dict.fromkeys(counts, 2) | {"momentum-sam": 1}
    expected |= {"periodic": 1.2, "rst": 1 + share}
    found = {name: [count["forward"], count["backward"]] for name, count in counts.items()}
    assert found == {name: pytest.approx([passes] * 2) for name, passes in expected.items()}
    assert counts["periodic"]["branch_shares"] == [0.8, 0.2]
    assert counts["sam"]["branch_shares"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_registry_says_who_reads_the_gradient(name):
    """A variant that does not read the gradient ignores its NaN; AsyncSAM only stores the NaN."""
    params, batch = make_problem()
    logits = jax.ShapeDtypeStruct((1,), jnp.float32)
    setting = Setting(batch, batch_size=8, num_examples=8, logits=logits)
    tx = optax.with_extra_args_support(VARIANTS[name].make(0.1, BASES["momentum"](0.1), setting))
    closures = {"losses_fn": losses_fn, "batch": batch, "index": jnp.arange(8, dtype=jnp.int32)}
    closures["ascent_fn"] = lambda params: losses_fn(params, batch).mean()
    closures["apply_fn"] = lambda params, batch: losses_fn(params, batch)[:, None]
    closures["loss_on_logits"] = lambda logits, batch: logits[:, 0]

    @jax.jit
    def step(state):
        return tx.update(jnp.full(3, jnp.nan), state, params, value=1.0, **closures)

    state, is_finite = tx.init(params), True
    for _ in range(6):
        updates, state = step(state)
        read = updates, optax.tree.get(state, "ascent_grad", default=0.0)
        is_finite &= all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(read))
    assert is_finite == (not VARIANTS[name].uses_gradient)


def product(params, batch, times):
    """Multiply `times` times, for a branch with a known number of flops."""
    for _ in range(times):
        params = params @ batch
    return params


def forked(fn, params, state, batch):
    """A branch without the loss, a switch with the loss on some branches, a branch inside one."""
    state = jax.lax.cond(state % 2 == 0, lambda: state + 1, lambda: state + 1)

    def inner():
        return jax.lax.cond(params[0, 0] > 0, lambda: fn(params, batch), lambda: 2 * params)

    branches = [
        lambda p: product(p, batch, 1),
        lambda p: product(fn(p, batch), batch, 2),
        lambda p: product(fn(p, batch), batch, 2),
        lambda p: product(inner() + p, batch, 5),
    ]
    return jax.lax.switch((state - 1) % 3, branches, params), state


def test_forks_are_the_outermost_on_which_the_loss_is_called():
    forks, x = Forks(), jnp.ones((64, 64))

    def step(params, state, batch):
        return forked(forks.watch(lambda p, b: jnp.tanh(p + b)), params, state, batch)

    args = x, jnp.int32(0), x
    assert forks.number_in(step, *args) == 4
    flops = step_cost.flops_of_branches(forks, 4, step, *args)
    np.testing.assert_allclose(np.array(flops) / (2 * 64**3), [1, 2, 2, 5], rtol=0.05)
    assert step_cost.distinct(flops) == sorted({flops[0], flops[1], flops[3]})
    with forks.counted():
        program = step_cost.compile_step(step, *args, is_timed=False)
    state = args[1]
    for _ in range(6):
        _, state = program(x, state, x)
    jax.effects_barrier()
    assert forks.taken == [0, 1, 2] * 2
    assert forks.number_in(lambda *args: product(x, x, 1), *args) == 0


def test_forks_leave_jax_as_it_was():
    before = jax.lax.cond, jax.lax.switch
    forks = Forks()
    with pytest.raises(ZeroDivisionError), forks.only(0):
        jax.lax.cond(jnp.bool_(True), lambda: forks.watch(lambda p, b: 1 / 0)(0, 0), lambda: 0)
    assert (jax.lax.cond, jax.lax.switch) == before


def half_batch():
    """A transformation with a gradient of half of the examples; it needs their `index`."""

    def init(params):
        return samx.core.readings.no_readings(params)

    def update(updates, state, params, *, losses_fn, batch, index, **_):
        assert (index.shape, index.dtype) == ((len(batch["label"]),), jnp.int32)
        chosen = first(batch, len(index) // 2)
        del updates
        value, g = jax.value_and_grad(lambda p: losses_fn(p, chosen).mean())(params)
        spent = state.gradients_spent + jnp.where(index[-1] == len(index) - 1, 0.5, jnp.inf)
        return g, state._replace(loss=value, gradients_spent=spent)

    return optax.GradientTransformationExtraArgs(init, update)


def tiny(rngs):
    return nnx.Linear(64, 10, rngs=rngs)


def tiny_conv(rngs):
    conv = nnx.Conv(1, 10, kernel_size=(3, 3), rngs=rngs)
    return nnx.Sequential(conv, lambda x: x.mean(axis=(1, 2)))


@pytest.fixture
def tiny_models(monkeypatch, in_empty_folder):
    """Two models instead of three; one has a convolution."""
    models = {
        "tiny": step_cost.Model(tiny, (64,), 32),
        "tiny conv": step_cost.Model(tiny_conv, (8, 8, 1), 8),
    }
    monkeypatch.setattr(step_cost, "MODELS", models)
    half = Variant(lambda *_: half_batch(), (0.1,), 0.5, 0.1, uses_gradient=False)
    some = {name: VARIANTS[name] for name in ("base", "sam", "periodic", "vsam")}
    for module in (step_cost, steps):
        monkeypatch.setattr(module, "VARIANTS", some | {"half": half})
    monkeypatch.setattr(choices, "VARIANTS", [*some, "half"])
    monkeypatch.setattr(choices, "BATCHES", {name: model.batch for name, model in models.items()})


@pytest.mark.slow
def test_step_cost_measures_every_variant_by_default(tiny_models, tmp_path, capsys, read_report):
    step_cost.main(["--repeats", "2", "--out", "cost"])
    report = read_report(tmp_path / "cost")
    tiny, conv = report["results"]
    rows, expected = tiny["rows"], ("sam", "periodic", "vsam", "half")
    assert set(expected) < set(rows)
    assert set(conv["rows"]) == set(rows)

    assert (rows["half"]["forward"], rows["half"]["backward"]) == (0.5, 0.5)
    assert rows["half"]["gradients"] == 0.5
    assert rows["half"]["mean_flops_to_gradient"] == pytest.approx(0.5, abs=0.05)
    assert rows["periodic"]["gradients"] == pytest.approx(1.2)
    # after the warm-up, in which all steps are sharp
    for passes in ("gradients", "forward", "backward"):
        assert 1 < rows["vsam"][passes] < 1.5
    for name, row in rows.items():
        branches = 2 * (name in ("periodic", "vsam"))
        assert (row["num_branches"], len(row["branch_shares"])) == (branches, branches)
        assert sum(row["branch_shares"]) == pytest.approx(branches / 2)
        assert len(row["branch_flops_to_gradient"]) == max(1, branches)
        assert row["peak_bytes"] > row["temporary_bytes"] > 0
        assert row["milliseconds"] == pytest.approx(1000 * np.median(row["seconds"]))
    plain, sharp = rows["periodic"]["branch_flops"]
    assert plain < 0.7 * sharp < 0.7 * 1.2 * rows["sam"]["flops"]
    assert rows["periodic"]["mean_flops"] == pytest.approx(0.8 * plain + 0.2 * sharp)
    assert rows["plain"]["peak_to_plain"] == 1

    printed = capsys.readouterr().out
    low, high = rows["periodic"]["branch_flops_to_gradient"]
    assert f"{low:.2f} | {high:.2f}" in printed
    for text in ("periodic*", "sam, all readings", "optax.contrib.sam", "forward", "peak"):
        assert text in printed
    assert (tmp_path / "cost" / "step_cost.png").stat().st_size > 10_000


def test_step_cost_takes_all_variants_when_told_to(tiny_models):
    every = ["sam", "periodic", "vsam", "half"]
    assert step_cost.parse([]).variants == every
    assert step_cost.parse(["--variants", "all"]).variants == every
    assert step_cost.parse(["--variants", "half", "sam"]).variants == ["half", "sam"]


@pytest.mark.parametrize("alias", [0, 100])
def test_peak_is_what_a_run_holds(alias):
    """One product's result may reuse the buffer of an argument, the other's may not."""
    x = jnp.ones((64, 64))
    donated = {"donate_argnums": 0} if alias else {}
    step = jax.jit(lambda x, y: jnp.tanh(x @ y) @ x, **donated)
    compiled = step.lower(x, x).compile()
    copies = peak_bytes(compiled) / x.nbytes
    assert copies >= 3
    assert copies <= 5 - bool(alias)


def test_a_tiny_run_over_batch_sizes(in_empty_folder, capsys, monkeypatch, read_report):
    tiny = step_cost.Model(lambda rngs: nnx.Linear(4, 10, rngs=rngs), (4,), 8)
    monkeypatch.setattr(step_cost, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(choices, "BATCHES", {"tiny": 8})
    monkeypatch.setattr(step_cost, "LEAST_SECONDS", 1e-3)
    monkeypatch.setattr(step_cost, "COUNTED_STEPS", 10)
    arguments = "--variants sampa --batch 2 1 2 --repeats 1 --out cost"
    step_cost.main(arguments.split())
    for name in ("step_cost.png", "sizes.png"):
        assert (in_empty_folder / "cost" / name).stat().st_size > 10_000
    report = read_report(in_empty_folder / "cost")
    found = [(result["model"], result["batch"]) for result in report["results"]]
    assert found == [("tiny", 1), ("tiny", 2)]
    for result in report["results"]:
        passes = {"gradient": 1, "plain": 1, "sam by hand": 2, "optax.contrib.sam": 2, "sampa": 2}
        found = {name: [row["forward"], row["backward"]] for name, row in result["rows"].items()}
        assert found == {name: [count, count] for name, count in passes.items()}
        for row in result["rows"].values():
            np.testing.assert_allclose(row["steps_per_second"], 1 / np.median(row["seconds"]))
    printed = capsys.readouterr().out
    for text in ("device:", "tiny: steps per second", "Largest batch at which sampa", "sizes.png"):
        assert text in printed


@pytest.mark.parametrize(
    ("ratios", "largest"),
    [((1.1, 1.15, 1.3), "4"), ((1.2, 1.9, 2.0), "none of these"), ((1, 1, 1), "16")],
)
def test_step_cost_says_where_sampa_costs_one_gradient(ratios, largest):
    def rows(ratio):
        return {
            "plain": {"steps_per_second": 1000.0},
            "sampa": {"steps_per_second": 1000 / ratio, "time_to_plain": [ratio, ratio, ratio]},
        }

    results = [{"batch": b, "rows": rows(r)} for b, r in zip((1, 4, 16), ratios, strict=True)]
    text = step_cost.summary(results)
    assert text.endswith(f"sampa takes less than 1.2 x plain: {largest}")
    assert f"{ratios[0]:.2f} [" in text
    without = [{"batch": r["batch"], "rows": {"plain": r["rows"]["plain"]}} for r in results]
    assert "sampa" not in step_cost.summary(without)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--repeats 0", "--repeats"),
        ("--batch 0", "--batch"),
        ("--batch 4 0", "--batch must be at least 1, got 0"),
        ("--models mlp", "mlp.*dense"),
        ("--variants sam sammy", "sammy.*choose from.*sampa"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(step_cost.main, arguments))
