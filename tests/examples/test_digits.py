"""Every example runs, writes what it promises, and rejects bad input before it starts."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import samx
from examples import digits
from examples.claims import second_order
from examples.common.output import free_folder
from examples.common.registry import BASES, VARIANTS, Setting, check_base
from examples.cost import step_cost
from examples.devices import parallel_cost
from examples.devices.communication import communicated_bytes

TINY = ["--seeds", "2", "--epochs", "1", "--width", "4"]
SOME = ["base2x", "sam", "ae-sam", "lightsam-norm"]  # one of each kind


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_digits_runs_variants_of_every_kind(in_empty_folder, capsys, fast_compilation):
    tiny = [*TINY, "--base", "adamw"]
    results = digits.main([*tiny, "--variants", *SOME, "--rho", "0.1", "--out", "results"])
    report = json.loads((in_empty_folder / "results" / "results.json").read_text())
    assert [r["row"] for r in report["results"]] == [r["row"] for r in results]
    assert {(r["row"], r["noise"]) for r in results} == {
        (row, noise) for row in SOME for noise in (0.3, 0.0)
    }
    for result in results:
        variant, times = digits.ROWS[result["row"]]
        steps = times * digits.STEPS_PER_EPOCH
        if variant == "ae-sam":  # its runs decide how many
            assert steps < result["gradients"] < 2 * steps
        else:
            assert result["gradients"] == steps * VARIANTS[variant].gradients
        assert result["gradients_by_epoch"][-1] == result["gradients"]
        assert len(result["gradients_by_epoch"]) == times
        assert len(result["test_accuracy"]) == 2
        assert len(result["test_accuracy_by_epoch"]) == times
        assert result["rho"] == (0.0 if variant == "base" else 0.1)
        assert result["seconds_per_step"] > 0
    assert (in_empty_folder / "results" / "digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("device:", "standard error", "test acc", "loss increase", "results.json", "cpu"):
        assert text in printed
    for row in SOME:
        assert row in printed


@pytest.mark.parametrize("gradients", [1.0, 1.2, 2.0])
def test_digits_times_sharp_and_plain_steps_by_their_share(gradients, monkeypatch):
    """On a fake clock, a plain step takes 1 s; every third step is sharp and takes 11 s."""
    ticks = iter(np.cumsum([0.0, *([1.0, 0.0] * 2 + [11.0, 0.0]) * digits.TIMED_STEPS]))
    monkeypatch.setattr(digits.time, "perf_counter", lambda: next(ticks))
    trainer = digits.Trainer(
        init=lambda runs, params: {"is_sharp": jnp.zeros(1, bool), "step": jnp.zeros(1)},
        epoch=digits.train,
        loss_increase=digits.train,
        step=lambda params, state, run, batch: (
            params,
            {"is_sharp": state["step"] % 3 == 2, "step": state["step"] + 1},
        ),
        accuracy=digits.train,
    )
    runs = digits.Runs(*(jnp.zeros(1, int) for _ in digits.Runs._fields))
    data = ({"x": jnp.zeros((1, digits.TRAIN, 1))},)
    seconds = digits.seconds_per_step(trainer, {}, runs, data, gradients)
    assert seconds == pytest.approx(1 + 10 * (gradients - 1))


def test_digits_shows_what_a_base_lacks():
    for variant in VARIANTS:
        for base in BASES:
            if (variant, base) == ("momentum-sam", "sgd"):
                with pytest.raises(ValueError, match="must have one momentum"):
                    check_base(variant, base)
            else:
                check_base(variant, base)


@pytest.mark.parametrize(("devices", "count"), [(1, 4), (8, 3), (24, 1)])
def test_registry_takes_microbatches_that_divide_the_examples_of_a_device(
    devices, count, monkeypatch
):
    taken = []
    monkeypatch.setattr(samx, "msam", lambda rho, count, **_: taken.append(count) or optax.sgd(0.1))
    setting = Setting(None, batch_size=120, num_examples=120, num_groups=devices)
    VARIANTS["msam"].make(0.1, optax.sgd(0.1), setting)
    assert taken == [count]


def test_digits_by_default_leaves_out_what_cannot_have_the_base():
    assert "momentum-sam" in digits.parse([]).variants
    assert digits.parse(["--base", "sgd"]).variants == [*digits.DEFAULT[:-1]]


@pytest.mark.slow
def test_digits_learns():
    (result,) = digits.main(
        ["--variants", "base", "--seeds", "2", "--epochs", "10", "--width", "32", "--noise", "0"]
    )
    assert np.mean(result["test_accuracy"]) > 0.9


def test_flipped_labels_are_wrong_and_only_in_training():
    seed = np.array([3])
    clean, noisy = (
        [{k: v[0] for k, v in part.items()} for part in digits.split(seed, noise)]
        for noise in (0.0, 0.3)
    )
    assert int((clean[0]["y"] != noisy[0]["y"]).sum()) == 0.3 * digits.TRAIN
    for part in (1, 2):
        np.testing.assert_array_equal(clean[part]["y"], noisy[part]["y"])
    assert [len(part["y"]) for part in clean] == [digits.TRAIN, digits.VALIDATION, 500]


BAD_ARGUMENTS = {
    digits: [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--noise 1.5", r"--noise must be in \[0, 1\), got 1.5"),
        ("--noise nan", "--noise must be in"),
        ("--rho -0.1", "--rho must be finite and at least 0"),
        ("--rho nan", "--rho must be finite and at least 0"),
        ("--base adagrad", "adagrad.*momentum"),
        ("--base sgd --variants sam momentum-sam", "momentum_sam: `base` must have one momentum"),
    ],
    second_order: [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--noise 1", r"--noise must be in \[0, 1\), got 1.0"),
        ("--rho nan", "--rho must be finite and at least 0, got nan"),
        ("--learning-rate 0", "--learning-rate must be finite and above 0, got 0.0"),
    ],
    step_cost: [
        ("--repeats 0", "--repeats"),
        ("--batch 0", "--batch"),
        ("--batch 4 0", "--batch: must be at least 1, got 0"),
        ("--models mlp", "mlp.*dense"),
    ],
}
PARALLEL_COST = [
    ("--batch 12", r"--batch must be powers of two, got \[12\]"),
    ("--devices 2 3", r"--devices must be powers of two, got \[2, 3\]"),
    ("--devices 0", "--devices must be powers of two"),
    ("--batch 4", "--batch must be at least the number of devices, got 4"),
    ("--repeats 0", "--repeats must be at least 1, got 0"),
    ("--model mlp", "mlp.*dense"),
    ("--out taken", "taken.*not empty"),
]
for _rows in BAD_ARGUMENTS.values():
    _rows += [
        ("--variants sam sammy", "sammy.*choose from.*sampa"),
        ("--out taken", "taken.*not empty"),
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [(script, *row) for script, rows in BAD_ARGUMENTS.items() for row in rows]
    + [(parallel_cost, *row) for row in PARALLEL_COST],
)
def test_bad_arguments(script, arguments, message, in_empty_folder, capsys):
    (in_empty_folder / "taken").mkdir()
    (in_empty_folder / "taken" / "results.json").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        script.main(arguments.split())
    assert stop.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert (in_empty_folder / "taken" / "results.json").read_text() == "precious"
    assert not (in_empty_folder / "runs").exists()


@pytest.mark.slow
def test_step_cost_over_batch_sizes(in_empty_folder, capsys, monkeypatch, fast_compilation):
    tiny = step_cost.Model(lambda rngs: nnx.Linear(4, 10, rngs=rngs), (4,), 8)
    monkeypatch.setattr(step_cost, "MODELS", {"one": tiny, "two": tiny})
    arguments = "--variants sampa sampa-separate --batch 2 1 2 --repeats 1 --out cost"
    step_cost.main(arguments.split())
    for name in ("step_cost.png", "sizes.png"):
        assert (in_empty_folder / "cost" / name).stat().st_size > 10_000
    report = json.loads((in_empty_folder / "cost" / "results.json").read_text())
    assert [(r["model"], r["batch"]) for r in report["results"]] == [
        ("one", 1),
        ("one", 2),
        ("two", 1),
        ("two", 2),
    ]
    for result in report["results"]:
        assert {"plain", "sampa", "sampa-separate"} <= set(result["rows"])
        for row in result["rows"].values():
            np.testing.assert_allclose(row["steps_per_second"], 1 / np.median(row["seconds"]))
    printed = capsys.readouterr().out
    for model in ("one", "two"):
        assert f"{model}: steps per second" in printed
    assert printed.count("Largest batch at which sampa") == 2


@pytest.mark.slow
@pytest.mark.parametrize("model", step_cost.MODELS)
def test_step_cost_trains_every_model(model, fast_compilation):
    losses_fn, params, batch = step_cost.problem(model, 3)
    losses = losses_fn(params, batch)
    assert losses.shape == (3,)
    plain = step_cost.reference_rows(losses_fn, params)["plain"]
    params, _, loss = jax.jit(plain.step)(params, plain.state, batch)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    assert losses_fn(params, batch).mean() < loss


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


def test_free_folder_never_overwrites(in_empty_folder):
    first, second = free_folder(None, "digits"), free_folder(None, "digits")
    assert (first.name, second.name) == ("digits-001", "digits-002")
    assert free_folder("new/deep", "digits").is_dir()
    (in_empty_folder / "file").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        free_folder("file", "digits")


@pytest.mark.slow
def test_parallel_cost_counts_what_the_formulas_say(in_empty_folder, capsys):
    results = parallel_cost.main(
        ["--batch", "256", "--devices", "2", "4", "--repeats", "1", "--out", "cost"]
    )
    assert len(results) == 2 * len(parallel_cost.METHODS)
    for result in results:
        wanted, found = result["formula"], result["counted"]
        assert found["sent"] == pytest.approx(wanted["sent"], rel=1e-4)
        assert found["flops"] == pytest.approx(wanted["flops"], rel=0.06)  # plus O(P) work
        assert found["state"] == pytest.approx(wanted["state"], rel=1e-3)
        assert found["temporary"] == pytest.approx(wanted["temporary"], rel=0.1)
    assert (in_empty_folder / "cost" / "parallel_cost.png").stat().st_size > 10_000
    report = json.loads((in_empty_folder / "cost" / "results.json").read_text())
    assert report["counts"] == results
    assert [row["share"] for row in report["times"]] == [2**i for i in range(7, -1, -1)]
    printed = capsys.readouterr().out
    for text in (*parallel_cost.METHODS, "T(2B/n) + 2P", "Where two groups lead", "results.json"):
        assert text in printed


def test_communicated_bytes_reads_every_operation():
    """It reads every kind of collective of a known size, and ignores groups of one device."""
    mesh = jax.make_mesh((2, 1), ("a", "one"))
    x = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P("a")))
    kinds = {
        "all-reduce": (lambda x: jax.lax.psum(x, "a"), 2 * 8 * 4),
        "all-gather": (lambda x: jax.lax.all_gather(x, "a"), 2 * 2 * 8 * 4),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "a"), 8 * 4),
        "collective-permute": (lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), 2 * 8 * 4),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, "a", 0, 0), 2 * 8 * 4),
    }
    for operation, (fn, size) in kinds.items():
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
        program = jax.jit(mapped).lower(x).compile()
        assert communicated_bytes(program) == {operation: size}
    alone = jax.shard_map(
        lambda x: jax.lax.psum(x, "one"), mesh=mesh, in_specs=P("a"), out_specs=P("a")
    )
    assert communicated_bytes(jax.jit(alone).lower(x).compile()) == {}
