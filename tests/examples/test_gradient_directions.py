"""The claims on directions: what the script writes, and its computations for known cases."""

import fake_directions
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import samx
from examples.claims import claim, frozen, gradient_directions, language_paths, recorded
from examples.common.digits_task import rows_of
from examples.common.training import loss_on_logits as losses_of
from examples.common.training import make_functions, start_of

FEW = (1, 2, 4)  # checkpoints


@pytest.fixture
def few_checkpoints(monkeypatch):
    monkeypatch.setattr(gradient_directions, "CHECKPOINTS", FEW)


@pytest.fixture
def without_trainings(few_checkpoints, monkeypatch):
    monkeypatch.setattr(
        gradient_directions, "of_seed", lambda seed, width: fake_directions.measured(seed, FEW)
    )
    monkeypatch.setattr(
        language_paths, "of_seed", lambda seed, *of: fake_directions.of_language(seed, FEW)
    )


def test_a_tiny_run(without_trainings, in_empty_folder, capsys, read_report):
    arguments = "--seeds 3 --language-seeds 2 --out results"
    found = gradient_directions.main(arguments.split())
    folder = in_empty_folder / "results"
    report = read_report(folder)
    assert [one.name for one in found] == [*gradient_directions.CLAIMS]
    assert report["claims"][0]["number"] == [*found[0].number]
    assert {name: len(values) for name, values in report["values"].items()} == {
        name: 2 if "language" in name or "difference" in name else 3
        for name in gradient_directions.CLAIMS
    }
    assert all(len({*values}) > 1 for values in report["values"].values())
    assert (folder / "gradient_directions.json").exists()
    assert (folder / "gradient_directions.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("xsam: ", "cosine with the way to the maximum", "sampa: ", "here, "):
        assert text in printed


@pytest.mark.slow
def test_a_real_run_gives_every_number(few_checkpoints, in_empty_folder, monkeypatch):
    monkeypatch.setattr(gradient_directions, "SEARCHED", 1)
    arguments = "--seeds 2 --language-seeds 2 --width 8 --out results"
    found = gradient_directions.main(arguments.split())
    assert all(np.isfinite(one.number).all() for one in found)


def test_the_committed_numbers_are_those_of_the_claims():
    values = claim.read(gradient_directions.NAME)
    assert {*values} == {*gradient_directions.CLAIMS}
    assert all(len(each) == 10 and np.isfinite(each).all() for each in values.values())


def measured_at(name, mine, theirs=None):
    """Return the value of a claim when some of the fake measures are replaced."""
    found = fake_directions.measured(0, FEW)
    for kind in gradient_directions.KINDS:
        found[kind] |= mine if theirs is None or kind == "sgd" else theirs
    return gradient_directions.values_of(found)[name]


def test_numbers_of_both_trainings_are_means(few_checkpoints):
    one, other = ({"along_top": np.full((3, 4), x)} for x in (0.1, 0.3))
    assert measured_at("eigen-alignment", one, other) == pytest.approx(0.2)


def test_slopes_belong_to_their_training(few_checkpoints):
    """The ratio of one training grows by 2 for each power of ten of the steps."""
    grows = {"ratio": 1 + 2 * np.log10(np.arange(1, 41))}
    flat = {"ratio": np.ones(40)}
    assert measured_at("arsam-growth-sgd", grows, flat) == pytest.approx(2, rel=1e-5)
    assert measured_at("arsam-growth", grows, flat) == pytest.approx(0, abs=1e-5)


def test_what_is_lost_of_the_maximum(few_checkpoints):
    shares = np.array([[0.9 - 0.5 * np.log10(epoch)] * 3 for epoch in FEW])
    assert measured_at("cr-one-step", {"one_step_share": shares}) == pytest.approx(-0.5)


def test_correlations():
    x = np.arange(12.0).reshape(3, 4)
    assert gradient_directions.correlated(x, np.exp(x)) == pytest.approx(1)
    assert gradient_directions.within(x, -x) == pytest.approx(-1)
    assert gradient_directions.within(x, np.tile(x[:1], (3, 1))) == pytest.approx(1)


def test_the_variation_counts_what_is_within_an_epoch():
    """The mean of each epoch does not matter, only the deviation: 1, 2, 3, 4."""
    wave = np.tile([1.0, -1.0], 5)
    change = np.concatenate([100 + k * wave for k in range(1, 5)])
    expected = gradient_directions.slope(np.arange(1, 5) / 2.5, np.arange(1, 5))
    assert gradient_directions.variation(change) == pytest.approx(expected)


def functions_of(logits, loss_on_logits):
    """Return the functions of a model of 3 inputs and 2 outputs."""

    def losses_fn(params, batch):
        return loss_on_logits(logits(params, batch["x"]), batch)

    return recorded.Net(logits, losses_fn, loss_on_logits)


def squared(logits, batch):
    return ((logits - batch["y"]) ** 2).sum(axis=-1) / 2


MODELS = {  # in the first the logits are linear in the weights, in the second the loss in them
    1: functions_of(lambda w, x: x @ w, squared),
    0: functions_of(lambda w, x: x @ w**3, lambda z, batch: (z * batch["y"]).sum(axis=-1)),
}


def place_of(net):
    batch = {"x": jnp.diag(jnp.array([1.0, 2.0, 3.0])), "y": jnp.ones((3, 2))}
    return frozen.place_of(net, jnp.arange(6.0).reshape(3, 2) / 5, batch, 0.1)


@pytest.mark.parametrize("share", MODELS)
def test_shares_of_the_logits_in_what_sam_changes(share):
    found = jax.jit(lambda: frozen.paths(place_of(MODELS[share])))()
    assert float(found["logit_share"]) == pytest.approx(share, abs=1e-5)


def test_the_step_of_a_method_is_that_of_its_ball():
    @jax.jit
    def steps():
        place = place_of(MODELS[1])
        return place.eps, frozen.climb_of(samx.sam(0.1), place.g, place.params)

    one, other = steps()
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert float(jnp.linalg.norm(one)) == pytest.approx(0.1)


def test_carriers_are_the_fewest_that_carry_the_share():
    share = jax.jit(frozen.carriers)
    assert float(share(np.sqrt([0.05, 0.6, 0.04, 0.31], dtype=np.float32))) == 0.5
    assert float(share(np.ones(4, np.float32))) == 1


def test_variances_are_over_batches():
    """The batches differ by a constant over the inputs only, which centralizing removes."""
    mean = np.array([[1.0, 0.0], [-1.0, 2.0]])
    found = jax.jit(lambda rows: frozen.variances(rows, lambda w: w.reshape(2, 2)))(
        jnp.asarray([mean.ravel() - 1, mean.ravel() + 1])
    )
    assert float(found["central_variance"]) == 0


def test_relative_variances_are_those_of_centralized_rows():
    rows = np.random.default_rng(0).normal(1, 2, (5, 4))
    central = (rows.reshape(5, 2, 2) - rows.reshape(5, 2, 2).mean(1, keepdims=True)).reshape(5, 4)

    def relative(rows):
        return ((rows - rows.mean(0)) ** 2).sum() / (rows.mean(0) ** 2).sum()

    found = jax.jit(lambda rows: frozen.variances(rows, lambda w: w.reshape(2, 2)))(rows)
    expected = relative(central) / relative(rows)
    assert float(found["central_relative"]) == pytest.approx(expected, rel=1e-4)


def test_the_ball_of_examples_divides_by_their_squared_gradients():
    """The step is along g / (1 + F / mean F)."""
    place = place_of(MODELS[1])
    x, y = np.diag([1.0, 2.0, 3.0]), np.ones((3, 2))
    each = x[:, :, None] * (x @ np.asarray(place.params) - y)[:, None, :]
    fisher, g = (each**2).mean(0), each.mean(0)
    expected = g / (1 + fisher / fisher.mean())
    found = np.asarray(jax.jit(lambda: frozen.fisher_steps(place)["examples"])())
    ratio = found / expected
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_parts_of_the_gradient_raise_the_loss_of_all_data():
    """A slope c over all data rises by radius · c · d for each direction d of length 1."""
    place, c = place_of(MODELS[1]), jnp.arange(1.0, 7.0).reshape(3, 2)
    average = 0.5 * place.g + c
    found = jax.jit(lambda: frozen.friendly(place, lambda w: jnp.vdot(c, w), average))()
    g = np.asarray(place.g)
    directions = {"sam": g, "full": c, "batch": g - c, "ema": g - average}
    for name, d in directions.items():
        expected = float(np.vdot(c, d / np.linalg.norm(d)))
        assert float(found[name]) == pytest.approx(0.1 * expected, rel=1e-3)
        assert float(found[f"{name}_small"]) == pytest.approx(frozen.SMALL * expected, rel=1e-2)
    expected = np.vdot(g, c) / np.linalg.norm(g) / np.linalg.norm(c)
    assert float(found["batch_cosine"]) == pytest.approx(expected, rel=1e-4)


def test_the_divergence_is_that_of_the_predictions_before():
    w, eps = np.array([[0.3, -1.0]]), np.array([[0.5, 0.2]])
    found = frozen.divergence(MODELS[1], jnp.asarray(w), jnp.asarray(eps), {"x": jnp.ones((1, 1))})
    p, q = (np.exp(z[0]) / np.exp(z[0]).sum() for z in (w, w + eps))
    assert float(found) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)


def test_errors_rise_where_the_step_turns_predictions():
    """The labels are the predictions; SAM's step turns some of them."""
    x = np.eye(3)
    w = np.array([[0.02, 0.0], [0.5, 0.0], [0.0, 0.5]])
    batch = {"x": jnp.asarray(x), "y": jnp.asarray((x @ w).argmax(1))}
    net = recorded.Net(lambda w, x: x @ w, lambda w, b: losses_of(b["x"] @ w, b), losses_of)
    place = frozen.place_of(net, jnp.asarray(w), batch, 0.3)
    found = jax.jit(lambda: frozen.errors(place))()
    turned = (x @ (w + np.asarray(place.eps))).argmax(1) != batch["y"]
    assert 0 < turned.sum() < 3
    assert float(found["sam_error"]) == pytest.approx(100 * float(turned.mean()), rel=1e-5)


def test_the_curvature_along_the_gradient():
    """On ½ (4 a² + b²) at (1, 1): g = (4, 1), and gᵀHg / gᵀg = 65 / 17."""
    net = recorded.Net(lambda w, x: x @ w, lambda w, batch: batch["x"] @ w**2 / 2, squared)
    place = frozen.place_of(net, jnp.ones(2), {"x": jnp.array([[4.0, 1.0]])}, 0.5)
    found = jax.jit(lambda: frozen.loss_rise(place, jnp.float32(0.1)))()
    assert float(found["curvature"]) == pytest.approx(65 / 17, rel=1e-5)


def test_one_step_is_compared_with_the_maximum_in_the_ball():
    """On ½ (4 a² + b²) at (1, 1), radius 0.5; the maximum is searched on the circle."""

    def losses_fn(w, batch):
        return (batch["x"] @ w**2) / 2

    net = recorded.Net(lambda w, x: x @ w**2, losses_fn, squared)
    place = frozen.place_of(net, jnp.ones(2), {"x": jnp.array([[4.0, 1.0]])}, 0.5)
    found = jax.jit(lambda: frozen.maximum(place)["one_step_share"])()

    def rise(a, b):
        return (4 * ((1 + a) ** 2 - 1) + (1 + b) ** 2 - 1) / 2

    angles = np.linspace(0, 2 * np.pi, 100_001)
    step = 0.5 * np.array([4.0, 1.0]) / np.sqrt(17)
    expected = rise(*step) / rise(0.5 * np.cos(angles), 0.5 * np.sin(angles)).max()
    assert expected < 0.9999
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_past_of_rows():
    x = jnp.asarray(np.tile(np.eye(2), (12, 1)), jnp.float32)  # each row is that before the last
    assert jax.jit(recorded.with_past)(x).tolist() == [0, 1] * 5


def test_a_recorded_training_takes_the_steps_of_its_batches():
    run = recorded.record("base", 0, 0.1, 0.0, 0.3, 8, 1)
    losses_fn, tree = make_functions(8).losses_fn, recorded.tree_of(8)

    @jax.jit
    def first(w):
        batch = rows_of(run.images, run.batches[0])
        return w - 0.1 * jax.grad(lambda w: losses_fn(tree(w), batch).mean())(w)

    assert run.weights.shape[0] == 11
    np.testing.assert_array_equal(run.weights[0], recorded.flat(start_of(0, 8)))
    np.testing.assert_allclose(run.weights[1], first(run.weights[0]), rtol=1e-4, atol=1e-6)
