"""The overparameterization study: its networks, its measures, and what it makes of results."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from examples.common import tuning
from examples.common.training import data_of
from examples.compare import overparameterization as study
from examples.compare import overparameterization_claims as summary
from examples.compare import overparameterization_measures as measures
from examples.compare import overparameterization_training as training
from examples.compare.overparameterization_training import Setting

SMALL = Setting(4, 1, 0.3)
TINY = "--results cells --seeds 2 --epochs 1"


@pytest.fixture(scope="module")
def trained():
    """Return layers that SAM has trained with half of the weights, their mask and their start."""
    start, programs = training.start_of(4, 1, 0), training.make_programs(4, 1)
    mask = training.mask_of(SMALL._replace(sparsity=0.5, pruning="random"), 0.1, 1, 0)
    train = data_of(0, 0.3)[0]
    layers = programs.sam(start, mask, 0, 0.1, 0.02, train, 4)
    return jax.device_get(layers), mask, jax.device_get(training.masked(start, mask))


def test_a_tiny_run(in_empty_folder, capsys, monkeypatch):
    """It writes a file for each setting, goes on where it stopped, and refuses other seeds."""
    pruned = SMALL._replace(sparsity=0.5, pruning="magnitude")
    settings = [SMALL, pruned]
    monkeypatch.setattr(study, "all_settings", lambda: settings)
    monkeypatch.setattr(study, "TUNING_SEEDS", range(1000, 1002))
    axes = [tuning.fixed([0.1, 0.2]), tuning.fixed([0.05])]
    monkeypatch.setattr(study, "axes_of", lambda setting, row: (axes, 2))
    results = study.main(f"{TINY} --out one".split())
    assert [*results] == settings
    rows = results[pruned]["rows"]
    assert [rows[row]["steps"] for row in study.ROWS] == [10, 20, 10]
    assert [rows[row]["gradients"] for row in study.ROWS] == [10, 20, 20]
    assert [len(row["candidates"]) for row in rows.values()] == [2, 2, 2]
    assert len({tuple(row["measures"]["test_loss"]) for row in rows.values()}) == 3
    assert rows["sam"]["measures"]["s2"] == [None, None]
    assert None not in results[SMALL]["rows"]["sam"]["measures"]["s2"]
    printed = capsys.readouterr().out
    for text in ("4 x 1, 50% pruned, magnitude", "SAM's gain is larger in sparse networks"):
        assert text in printed
    assert (in_empty_folder / "one" / "overparameterization.png").stat().st_size > 10_000
    lines = (in_empty_folder / "cells" / f"{SMALL.name}.json").read_text().splitlines()
    assert sum(line.strip().startswith('"test_loss": [') for line in lines) == 3
    (in_empty_folder / "cells" / f"{pruned.name}.json").unlink()
    monkeypatch.setattr(study, "measure_setting", lambda *args: pytest.fail("trained again"))
    again = study.main(f"{TINY} --only-tables --out two".split())
    assert again == {SMALL: results[SMALL]}
    with pytest.raises(SystemExit):
        study.main(f"{TINY} --only-tables --out three --seeds 3".split())
    assert "other seeds or epochs" in capsys.readouterr().err


def test_pruned_weights_stay_zero(trained):
    layers, mask, start = trained
    assert sum(int(x.sum()) for x in jax.tree.leaves(mask)) == (64 * 4 + 4 * 10) / 2 + 14
    for layer, kept, before in zip(layers, mask, start, strict=True):
        assert not layer["kernel"][kept["kernel"] == 0].any()
        assert not before["kernel"][kept["kernel"] == 0].any()
        assert np.mean(layer["kernel"] != before["kernel"]) > 0.3


def test_sam_without_a_radius_is_the_base():
    programs, start = training.make_programs(4, 1), training.start_of(4, 1, 0)
    arguments = start, training.mask_by(start, 0.0), 0, 0.1, 0.0, data_of(0, 0.3)[0], 4
    base, sam = programs.base(*arguments), programs.sam(*arguments)
    for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(sam), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_masks_keep_the_largest_weights_of_all_kernels():
    scores = [
        {"kernel": np.array([[1.0, 6.0], [2.0, 5.0]]), "bias": np.zeros(2)},
        {"kernel": np.array([[3.0], [4.0]]), "bias": np.zeros(1)},
    ]
    first, second = training.mask_by(scores, 0.5)
    assert first["kernel"].tolist() == [[0, 1], [0, 1]]
    assert second["kernel"].tolist() == [[0], [1]]
    assert first["bias"].tolist() == [1, 1]


def test_settings():
    """Every pruned network has a dense one of its size, and one from which it is pruned."""
    settings = study.all_settings()
    assert len({setting.name for setting in settings}) == len(settings) == 64
    for setting in settings:
        if setting.pruning:
            other = summary.as_large_as(setting, settings)
            assert other is not None
            assert other.width == study.AS_LARGE[setting.sparsity]
            assert settings.index(setting.dense) < settings.index(setting)
    assert Setting(64, 2, 0.0).parameters == 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    assert Setting(64, 1, 0.0, 0.5, "random").parameters == (64 * 64 + 640) / 2 + 74


def test_the_hessian_is_measured(trained):
    """Against the whole Hessian; the programs are those of the tiny run."""
    layers, mask, start = trained
    train, _, test = data_of(0, 0.3)
    w, unravel = ravel_pytree(layers)

    def hessian(images):
        def loss(w):
            return training.losses_of(training.masked(unravel(w), mask), images).mean()

        return jax.hessian(loss)(w)

    sample = measures.sample_of(train)
    is_wrong = sample["index"] < 0.3 * len(train["y"])
    assert is_wrong.mean() == pytest.approx(0.3)
    one_by_one = jax.tree.map(lambda leaf: leaf[:, None], sample)
    h, h_i = jax.jit(lambda a, b: (hessian(a), jax.lax.map(hessian, b)))(train, one_by_one)
    h, h_i = np.asarray(h), np.asarray(h_i)
    found = study.measure_run(layers, mask, start, train, test)
    assert found["top_eigenvalue"] == pytest.approx(np.linalg.eigvalsh(h)[-1], rel=1e-3)
    ends = np.cumsum([sum(x.size for x in layer.values()) for layer in layers])
    for number, part in enumerate(np.split(np.arange(len(w)), ends[:-1])):
        count = sum(x.sum() for x in mask[number].values())
        squares, diagonal = np.sum(h[part] ** 2), np.diag(h)[part]
        error = float(4 * np.sqrt(2 * (squares - np.sum(diagonal**2)) / measures.DRAWS))
        trace = found["layer_trace"][number] * count
        assert trace == pytest.approx(diagonal.sum(), abs=error)
        assert found["layer_square"][number] * count == pytest.approx(squares, rel=0.6)
    mean = h_i.mean(axis=0)
    variance = np.einsum("nij,njk->ik", h_i, h_i, optimize=True) / len(h_i) - mean @ mean
    s2 = study.non_uniformity_of_run(layers, mask, sample)
    assert s2 == pytest.approx(np.sqrt(np.linalg.eigvalsh(variance)[-1]), rel=0.05)


def test_the_distance_from_the_linearization():
    """A network without hidden layers is its linearization; with one, it is not."""
    test = {"x": jnp.asarray(data_of(0, 0.0)[2]["x"])}
    rng = np.random.default_rng(0)

    def found(*sizes):
        start, layers = (
            [
                {"kernel": rng.normal(size=(a, b)), "bias": rng.normal(size=b)}
                for a, b in itertools.pairwise(sizes)
            ]
            for _ in range(2)
        )
        return jax.jit(measures.of_path)(layers, start, test), layers, start

    linear, layers, start = found(64, 10)
    assert linear["linearization"] < 1e-5
    move = [np.ravel(a[n] - b[n]) for a, b in zip(layers, start, strict=True) for n in a]
    before = [np.ravel(b[n]) for b in start for n in b]
    lengths = [np.linalg.norm(np.concatenate(parts)) for parts in (move, before)]
    assert linear["distance"] == pytest.approx(lengths[0] / lengths[1], rel=1e-5)
    assert found(64, 4, 10)[0]["linearization"] > 0.1


def result_of(setting, sam, base, base2x=0.5, rho=0.1, top=(2.0, 1.0)):
    """Return a result with these test accuracies of each seed."""

    def row(values, top):
        values = np.broadcast_to(values, np.shape(sam)).tolist()
        names = ("test_accuracy", "train_accuracy", "s2", "linearization")
        found = dict.fromkeys(names, values) | {"top_eigenvalue": [top] * len(values)}
        return {"rho": rho, "edges": [], "measures": found}

    rows = {"base": row(base, top[0]), "base2x": row(base2x, top[0]), "sam": row(sam, top[1])}
    return {"setting": setting._asdict(), "rows": rows}


def test_claims_are_made_from_numbers():
    """Gains of 1, 2, 3 points along the widths, and of twice that with wrong labels."""
    results = {}
    for noise, factor in ((0.0, 0.01), (0.3, 0.02)):
        for place, width in enumerate((16, 64, 256)):
            setting = Setting(width, 2, noise)
            sam = 0.9 + (1 + place) * factor + np.array([-0.04, 0.04]) * (place == 2)
            results[setting] = result_of(setting, sam, [0.9, 0.9], rho=0.3 / (1 + place))
    claims = {c[:3]: c for c in summary.claims_of(results)}
    growth = claims[summary.GROWS, "all widths", 0.0]
    x = np.log10([setting.parameters for setting in [*results][:3]])
    expected = [np.polyfit(x, [1, 2, last], 1)[0] for last in (-1, 7)]
    assert growth.number.value == pytest.approx(np.mean(expected))
    assert growth.verdict == "open"  # two seeds that differ
    noisy = claims[summary.NOISE, "all widths", 0.3]
    assert noisy.number == pytest.approx((2, 2, 2))
    assert noisy.verdict == "holds here"
    flat = claims[summary.MINIMA["top_eigenvalue"], "widths from 16", 0.0]
    assert flat.number == pytest.approx((np.log10(2),) * 3)
    assert summary.verdicts([growth, noisy, growth])[0].endswith(
        "holds in 0 of 2 tests, the opposite in 0"
    )


def test_the_radius_is_claimed_from_five_networks_on():
    """With fewer no rank correlation is beyond chance."""
    results = {
        Setting(width, 2, 0.0): result_of(Setting(width, 2, 0.0), [0.9], [0.9], rho=1 / width)
        for width in (4, 16, 64, 128, 256)
    }
    series = summary.Series("all widths", 0.0, [*results])
    [claim] = summary.of_radius(results, [series])
    assert claim.number == pytest.approx((-1, -1, -1 + 1.96 / 2))
    assert summary.of_radius(results, [series._replace(settings=[*results][1:])]) == []


def test_a_claim_can_fail():
    claim = summary.Claim("", "", 0.0, summary.Interval(-2.0, -3.0, -1.0))
    assert claim.verdict == "the opposite holds here"


def test_sparse_networks_are_compared_with_their_dense_ones():
    sparse, dense = Setting(128, 2, 0.0, 0.95, "random"), Setting(128, 2, 0.0)
    small = Setting(16, 2, 0.0)
    results = {
        dense: result_of(dense, [0.91, 0.92], [0.9, 0.9]),
        small: result_of(small, [0.89, 0.9], [0.9, 0.9]),
        sparse: result_of(sparse, [0.85, 0.86], [0.7, 0.7], base2x=0.8),
    }
    claims = {claim.text: claim.number.value for claim in summary.claims_of(results)}
    assert claims[summary.SPARSE] == pytest.approx(5.5 - 1.5)
    assert claims[summary.SIZE] == pytest.approx(5.5 + 0.5)
    assert claims[f"{summary.SPARSE}; over SGD with as many steps"] == pytest.approx(15.5 - 1.5)


def test_committed_results():
    """They are small, and those of the settings; every width has clean and wrong labels."""
    args = study.parse([])
    results = study.read_all(args)
    names = {path.stem for path in args.results.glob("*.json")}
    assert names == {setting.name for setting in results}
    for noise in study.NOISES:
        assert len(summary.widths_of(results, noise)) >= 7
    for setting, result in results.items():
        assert result["parameters"] == setting.parameters
        assert [*result["rows"]] == [*study.ROWS]
        assert len(result["rows"]["sam"]["measures"]["test_accuracy"]) == args.seeds
        text = (args.results / f"{setting.name}.json").read_text()
        assert len(text) < 16_000
        assert json.loads(study.as_text(result)) == result
