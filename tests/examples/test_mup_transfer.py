"""The µP² example: what it writes, and whether its exponents are those of the theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.claims import mup_transfer
from examples.claims.claim import read


@pytest.mark.slow
def test_exponents_of_mup_are_zero_and_those_of_sam_are_not(tmp_path):
    arguments = "--widths 256 512 1024 --seeds 2 --steps 1 10 --out"
    args = mup_transfer.parse([*arguments.split(), str(tmp_path)])
    results = mup_transfer.fit(args.widths, args.steps, mup_transfer.measure_effects(args))
    found = {
        tuple(result[key] for key in ("method", "steps", "perturbed", "layer")): result
        for result in results
    }
    assert len(found) == len(results) == 2 * 2 * 2 * 3
    # In the limit of infinite width, SAM's are -3/2, -1/2 and 1/2 at the first step.
    sam = {"first": (-1.6, -1.1), "second": (-0.7, -0.3), "head": (0.15, 0.7)}
    for (method, *_, layer), result in found.items():
        low, high = sam[layer] if method == "sam" else (-0.1, 0.1)
        assert low < result["exponent"] < high, result
        np.testing.assert_allclose(np.mean(result["exponent_by_seed"]), result["exponent"])
        assert (len(result["exponent_by_seed"]), len(result["effect_by_width"])) == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mup_sam", "sam"])
def test_the_effects_are_those_of_the_perturbation(name):
    """Compare with the formula, written out for the layers of a network an eighth as wide."""
    width, rho = mup_transfer.BASE_WIDTH // 8, 0.3
    batch = jax.tree.map(lambda leaf: leaf[0], mup_transfer.make_data(0, 1).batches)
    assert batch["x"].shape == (mup_transfer.BATCH, 64)
    params = jax.jit(mup_transfer.initialize, static_argnums=1)(0, width)
    g = jax.jit(jax.grad(mup_transfer.loss), static_argnums=2)(params, batch, width)
    scales = {
        "first": {"kernel": 1 / 8, "bias": 1 / 8},
        "second": {"kernel": 1.0, "bias": 1 / 8},
        "head": {"kernel": 8.0, "bias": 1.0},
    }
    if name == "sam":
        scales = jax.tree.map(lambda s: 1.0, scales)
    squares = jax.tree.map(lambda g, s: s * np.sum(np.square(g, dtype=np.float64)), g, scales)
    length = np.sqrt(sum(jax.tree.leaves(squares)))
    eps = jax.tree.map(lambda g, s: np.asarray(rho * s * g / length), g, scales)

    def features(layers):
        """Return the outputs of all layers; those in `layers` are perturbed."""
        x, out = np.asarray(batch["x"]), []
        for layer in ("first", "second", "head"):
            kernel, bias = (np.asarray(params[layer][key]) for key in ("kernel", "bias"))
            if layer in layers:
                kernel, bias = kernel + eps[layer]["kernel"], bias + eps[layer]["bias"]
            out.append(x @ kernel + np.broadcast_to(bias, (len(x), len(bias))))
            x = np.maximum(out[-1], 0)
        return out

    def change(layers):
        pairs = zip(features(layers), features(()), strict=True)
        return [np.sqrt(np.mean((after - before) ** 2)) for after, before in pairs]

    of_all = change(("first", "second", "head"))
    of_own = [change((layer,))[i] for i, layer in enumerate(("first", "second", "head"))]
    effects = jax.jit(mup_transfer.effects, static_argnums=(0, 4))(name, params, batch, rho, width)
    np.testing.assert_allclose(effects, [of_all, of_own], rtol=1e-3)


@pytest.mark.slow
def test_the_effects_are_those_after_training():
    """Effects are measured on the next batch. At learning rate 0 they are those at the start."""
    width, rho, name = 16, 0.3, "mup_sam"
    batches = mup_transfer.make_data(0, 3).batches
    probe = mup_transfer.make_probe(name, width, (1, 2))
    still, trained = (probe(0, batches, learning_rate, rho) for learning_rate in (0.0, 0.1))
    params = jax.jit(mup_transfer.initialize, static_argnums=1)(0, width)
    effects = jax.jit(mup_transfer.effects, static_argnums=(0, 4))
    for step in (1, 2):
        batch = jax.tree.map(lambda leaf, step=step: leaf[step], batches)
        np.testing.assert_allclose(still[step - 1], effects(name, params, batch, rho, width), 1e-4)
    assert np.all(np.abs(trained / still - 1) > 1e-4)
    at_once = mup_transfer.make_probe(name, width, (2,))(0, batches, 0.1, rho)
    np.testing.assert_allclose(at_once[0], trained[1], 1e-4)


def test_the_slope_is_the_power_of_the_width():
    widths, powers = [64, 128, 512], np.array([[-1.5, 0.0], [0.5, 2.0]])
    effects = 3 * np.array(widths)[:, None, None] ** powers[None]
    np.testing.assert_allclose(mup_transfer.slopes(widths, effects), powers, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 256])
def test_the_initialization_is_that_of_mup(width):
    """The head's variance falls with the square of the width; at the base width it is as usual."""
    params = jax.jit(mup_transfer.initialize, static_argnums=1)(0, width)
    variances = {layer: float(jnp.var(params[layer]["kernel"])) for layer in params}
    wanted = {"first": 1 / 64, "second": 1 / width, "head": 64 / width**2}
    assert variances == pytest.approx(wanted, rel=0.15)
    assert not any(params[layer]["bias"].any() for layer in params)


def test_the_best_pair_is_found_and_compared():
    """A diverged run (None) is never the best one."""
    narrow = {"loss": [[3, 2, 1.5], [2, 1, 2]], "accuracy": [[0.1, 0.2, 0.9], [0.3, 0.5, 0.2]]}
    wide = {"loss": [[0.5, 2, 4], [None, 3, None]], "accuracy": [[0.1, 0.2, 0.1], [0.8, 0.3, None]]}
    grids = [
        {"method": "mup_sam", "width": 64} | narrow,
        {"method": "sam", "width": 64} | narrow,
        {"method": "mup_sam", "width": 128} | wide,
        {"method": "sam", "width": 128} | narrow,
    ]
    mup_loss, mup_accuracy, *of_sam = mup_transfer.compare_widths(grids, [0.1, 0.2], [1, 2, 4])
    assert (mup_loss["method"], mup_loss["criterion"]) == ("mup_sam", "loss")
    assert mup_loss["narrow"] == {"width": 64, "learning_rate": 0.2, "rho": 2}
    assert mup_loss["wide"] == {"width": 128, "learning_rate": 0.1, "rho": 1}
    assert (mup_loss["wide_with_narrow_best"], mup_loss["wide_best"]) == (3, 0.5)
    assert (mup_loss["grid_steps"], mup_loss["within_one_step"]) == ([-1, -1], True)
    assert (mup_accuracy["narrow"]["rho"], mup_accuracy["wide"]["rho"]) == (4, 1)
    assert (mup_accuracy["grid_steps"], mup_accuracy["within_one_step"]) == ([1, -2], False)
    assert [result["criterion"] for result in of_sam] == ["loss", "accuracy"]
    for result in of_sam:
        assert (result["method"], result["grid_steps"]) == ("sam", [0, 0])


def of_grids(losses):
    """Return made-up numbers of one seed, one learning rate and some rhos: loss and accuracy."""
    return np.array([[[losses]], [[[0.1] * len(losses)]]])


def test_the_numbers_of_the_claims():
    """Of two seeds, one moves by two steps of the grid; SAM loses where the pair is kept."""
    narrow = np.array([[[3, 1, 2.0]], [[3, 1, 2]]])
    still, moved = np.array([[[3, 1, 2.0]], [[3, 2, 1]]]), np.array([[[1, 3, 5.0]], [[1, 5, 9]]])
    grids = [
        {"method": name, "width": width}
        | mup_transfer.grids_of(np.array([losses, np.stack([losses[0], losses[0]]) / 10]))
        for width, by_method in ((64, (narrow, narrow)), (128, (still, moved)))
        for name, losses in zip(("mup_sam", "sam"), by_method, strict=True)
    ]
    assert mup_transfer.of_transfer(grids) == {
        "mup-best-pair": [0, 1],
        "mup-keeps-more": [1, 0],
        "mup-range": [3, 8],
        "mup-keeps-loss": [2, 4],
        "mup-accuracy": pytest.approx([-20, -20]),
    }
    rows = [
        {"method": name, "steps": steps, "perturbed": perturbed, "exponent_by_seed": of}
        for name, scale in (("mup_sam", 0.01), ("sam", 1.0))
        for steps in (1, 10)
        for perturbed in ("all", "own")
        for of in ([-2 * scale, -1 * scale], [-scale, -3 * scale], [scale, 2 * scale])
    ]
    found = mup_transfer.of_exponents(rows)
    assert found["mup-exponents"] == pytest.approx([0.02, 0.03])
    assert found["sam-exponents"] == pytest.approx([1, 1])
    assert found["sam-last-layer"] == pytest.approx([-2, -3])


def test_the_committed_numbers_are_those_of_the_claims():
    assert read("mup_transfer").keys() == mup_transfer.CLAIMS.keys()


def test_a_grid_whose_runs_all_diverged_is_shown_as_that(tmp_path, monkeypatch, capsys):
    grids = [
        {"method": name, "width": width} | mup_transfer.grids_of(of_grids([np.nan, np.nan]))
        for width in (64, 72)
        for name in mup_transfer.METHODS
    ]
    monkeypatch.setattr(mup_transfer, "measure_grids", lambda args: grids)
    sizes = "--learning-rates 0.1 --rhos 0.1 0.2 --parts transfer --out"
    report = mup_transfer.main([*sizes.split(), str(tmp_path)])
    assert report["transfer"][0]["wide_best"] is None
    assert "nan" not in capsys.readouterr().out
    assert (tmp_path / "mup_transfer.png").stat().st_size > 5_000


@pytest.mark.parametrize(("wide", "at_edge"), [((1, 1), False), ((2, 1), True), ((1, 0), True)])
def test_a_best_pair_at_the_edge_is_told(wide, at_edge):
    rates, rhos = [0.1, 0.2, 0.4], [1, 2, 4]

    def grid(width, best):
        loss = np.ones((3, 3))
        loss[best] = 0
        return {"width": width, "loss": loss.tolist(), "accuracy": (1 - loss).tolist()}

    grids = [
        {"method": name} | grid(*of)
        for of in ((64, (1, 1)), (128, wide))
        for name in mup_transfer.METHODS
    ]
    found = mup_transfer.compare_widths(grids, rates, rhos)
    assert [result["at_edge"] for result in found] == [at_edge] * 4


def test_a_tiny_run(in_empty_folder, capsys, read_report):
    sizes = "--widths 32 16 --seeds 2 --steps 1 --transfer-widths 72 64"
    grids = "--transfer-steps 2 --transfer-seeds 1 --learning-rates 0.1 0.4 --rhos 0.1 1e6"
    report = mup_transfer.main(f"{sizes} {grids} --out results".split())
    read = read_report(in_empty_folder / "results")
    assert {name: read[name] for name in report} == report
    assert (in_empty_folder / "results" / "mup_transfer.png").stat().st_size > 10_000

    assert read["settings"]["widths"] == [16, 32]
    assert [result["steps"] for result in report["exponents"]] == [1] * 12
    of_base, same, of_mup, of_sam = report["grids"]
    assert [result["width"] for result in report["grids"]] == [64, 64, 72, 72]
    assert of_base["loss"] == same["loss"]  # at the base width the methods are the same
    assert of_mup["loss"] != of_sam["loss"]
    assert of_mup["loss"][0] != of_mup["loss"][1]  # another learning rate
    assert np.shape(of_mup["loss"]) == np.shape(of_sam["accuracy"]) == (2, 2)
    for result in report["transfer"]:
        assert result["narrow"]["rho"] == result["wide"]["rho"] == 0.1  # the other rho is absurd
    printed = capsys.readouterr().out
    for text in ("device:", "perturbed", "µP²", "SAM", "of 6 exponents are within 0.1 of 0"):
        assert text in printed
    for text in ("µP² and SAM, width 64: loss", "SAM, width 72: loss", "results.json", ".png"):
        assert text in printed
    tables, *_ = printed.split("kept: what the best pair")
    assert tables.count("[") == 3  # the best of each grid


@pytest.mark.parametrize("part", mup_transfer.PARTS)
def test_one_part_alone(part, tmp_path, monkeypatch, capsys, read_report):
    """With a single seed and a diverged run, neither the file nor the table has a NaN."""
    made_up = {
        "exponents": lambda args: {
            name: np.full((2, 1, 1, 2, 3), 0.5) for name in ("mup_sam", "sam")
        },
        "transfer": lambda args: [
            {"method": name, "width": width} | mup_transfer.grids_of(of_grids([0.5, np.nan]))
            for width in (64, 72)
            for name in ("mup_sam", "sam")
        ],
    }

    def never(args):
        raise AssertionError("not asked for")

    functions = {"exponents": "measure_effects", "transfer": "measure_grids"}
    for name, function in functions.items():
        monkeypatch.setattr(mup_transfer, function, made_up[name] if name == part else never)
    sizes = "--widths 16 32 --seeds 1 --steps 1 --learning-rates 0.1 --rhos 0.1 0.2"
    report = mup_transfer.main(f"{sizes} --parts {part} --out {tmp_path}".split())
    assert [name for name in mup_transfer.PARTS if name in report] == [part]
    if part == "exponents":
        found = {(abs(result["exponent"]) < 1e-12, result["error"]) for result in report[part]}
        assert found == {(True, None)}
    assert part in read_report(tmp_path)
    assert (tmp_path / "mup_transfer.png").stat().st_size > 5_000
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--widths 64", "--widths must have at least two different widths"),
        ("--transfer-widths 64 64", "--transfer-widths must have at least two different widths"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--transfer-seeds 0", "--transfer-seeds must be at least 1, got 0"),
        ("--rhos 0.1 -0.2", "--rhos must be finite and above 0"),
        ("--learning-rate nan", "--learning-rate must be finite and above 0"),
        ("--parts all", "invalid choice: 'all'"),
        ("--out taken", "taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(mup_transfer.main, arguments)
