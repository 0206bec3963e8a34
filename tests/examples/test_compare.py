"""The comparison: its protocol on a toy task, what a cell holds, and how a run is continued."""

import itertools
import json
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from filelock import FileLock
from flax import nnx

from examples.compare import compare, protocol, runs
from examples.compare.rows import tail_of, variants_of
from examples.compare.task import Splits, Task, balanced_weights, equal_weights
from examples.compare.tasks import TASKS


class Network(nnx.Module):
    """A layer with BatchNorm before the output layer."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.0, use_running_average=False, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def features(self, x):
        return nnx.relu(self.norm(self.first(x)))


@cache
def data(seed):
    rng = np.random.default_rng(seed)

    def split(count):
        x = rng.normal(size=(count, 3)).astype(np.float32)
        return {"x": x, "y": (x.sum(axis=1) > 0).astype(np.int32)}

    train, validation, test = split(10), split(8), split(12)
    train["index"] = np.arange(10, dtype=np.int32)
    return Splits(
        train,
        validation | {"weight": equal_weights(8)},
        test | {"weight": balanced_weights(test["y"])},
    )


TOY = Task(
    **{"title": "toy", "tier": 1, "data": data, "network": Network, "num_train": 10, "batch": 4},
    **{"budget": 12, "learning_rate": 0.1, "input_noise": 0.1, "seeds": 2, "tuning_seeds": 1},
    measured=10,
)
TIMES = ("milliseconds_per_step", "time_of_base_step", "seconds", "equal_time")


make_trainer = cache(runs.make_trainer)


@pytest.fixture
def toy(monkeypatch):
    """Make the toy the only task; its programs are compiled once."""
    monkeypatch.setattr(compare, "TASKS", {"toy": TOY, "later": TOY._replace(tier=2)})
    for module in (runs, protocol):
        monkeypatch.setattr(module, "make_trainer", make_trainer)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


def run(folder, *rows):
    compare.main(["--results", str(folder), "--trials", "2", "--rows", *rows])


def without_times(path):
    return {name: x for name, x in json.loads(path.read_text()).items() if name not in TIMES}


def test_a_tiny_run(toy, tmp_path, capsys):
    """Equal gradients; what is there stays; a resumed comparison equals an undisturbed one."""
    run(tmp_path / "a", "base", "base2x", "sam")
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "a").rglob("*.json")}
    assert [cells[row]["steps"] for row in ("base", "base2x", "sam")] == [6, 12, 6]
    assert [cells[row]["gradients"] for row in ("base", "base2x", "sam")] == [6, 12, 12]
    for cell in cells.values():
        assert {
            "test_loss",
            "test_loss_input_noise",
            "test_loss_3_bits",
            "trace",
            "m_sharpness",
        } < {*cell["measures"]}
        assert all(len(values) == 2 for values in cell["measures"].values())
        assert len(cell["candidates"]) >= 2
        assert (cell["row"] == "sam") == ("equal_time" in cell)
    assert "3 cells made" in capsys.readouterr().out

    run(tmp_path / "b", "base", "sam")
    begun = (tmp_path / "b" / "toy" / "sam.json").stat().st_mtime_ns
    run(tmp_path / "b", "base", "base2x", "sam")
    assert "1 cells to make" in capsys.readouterr().out
    assert (tmp_path / "b" / "toy" / "sam.json").stat().st_mtime_ns == begun
    for row in cells:
        paths = [tmp_path / folder / "toy" / f"{row}.json" for folder in "ab"]
        assert without_times(paths[0]) == without_times(paths[1])

    # A cell can be measured again: the chosen numbers stay, and the same networks are trained.
    path, before = tmp_path / "b" / "toy" / "sam.json", cells["sam"]
    measures = {name: [0.0, 0.0] for name in before["measures"]}
    path.write_text(json.dumps(before | {"time_of_base_step": 1e-9, "measures": measures}))
    run(tmp_path / "b", "sam", "--again")
    after = json.loads(path.read_text())
    assert after["time_of_base_step"] > 0.1
    assert after["equal_time"]["steps"] == pytest.approx(12 / after["time_of_base_step"], abs=0.51)
    assert without_times(path) == {n: x for n, x in before.items() if n not in TIMES}
    assert after["seconds"] == before["seconds"]


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit):
        compare.main(list(arguments))
    return capsys.readouterr().err


def test_what_is_refused(toy, tmp_path, capsys):
    """Cells of other settings, damaged cells, unknown names, and a tier that comes too early."""
    results = ("--results", str(tmp_path))
    assert "unknown 'sum'; there are toy" in refusal(capsys, "--tasks", "sum", *results)
    assert "unknown 'sma'; there are base" in refusal(capsys, "--rows", "sma", *results)
    assert "later: its rows are chosen from" in refusal(capsys, "--tier", "2", *results)
    (tmp_path / "toy").mkdir()
    path = tmp_path / "toy" / "sam.json"
    path.write_text(json.dumps(compare.settings_of("toy", "sam", 3)))
    message = refusal(capsys, *results, "--trials", "2", "--rows", "sam")
    assert "sam.json has trials 3, wanted 2" in message
    path.write_text(json.dumps(compare.settings_of("toy", "sam", 16)))
    assert "sam.json: no " in refusal(capsys, *results, "--rows", "sam")
    path.write_text("{")
    assert "sam.json is not JSON" in refusal(capsys, *results, "--rows", "sam")
    assert "either tiers or --tasks" in refusal(capsys, "--tier", "1", "--tasks", "toy")


def test_where_nothing_can_be_written_nothing_is_trained(toy, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "toy").touch()
    for name in ("file", "cells"):
        message = refusal(capsys, "--results", str(tmp_path / name), "--rows", "base")
        assert "error: --results: " in message
    (tmp_path / "used").mkdir()
    with FileLock(tmp_path / "used" / ".lock"):
        message = refusal(capsys, "--results", str(tmp_path / "used"), "--rows", "base")
    assert "is used by another run" in message


def test_a_row_that_fails_stops_no_other(toy, tmp_path, monkeypatch, capsys):
    def tune_cell(method, trials):
        if method.row == "base":
            raise ValueError("too large")
        return {"learning_rate": 0.1, "rho": 0.0}

    measures = {"measures": {"test_accuracy": [0.5, None]}}
    monkeypatch.setattr(protocol, "tune_cell", tune_cell)
    monkeypatch.setattr(protocol, "measure_cell", lambda *_: measures)
    monkeypatch.setattr(protocol, "time_cell", lambda *_: {})
    with pytest.raises(SystemExit, match="failed: toy, base: too large"):
        run(tmp_path, "base", "sam")
    assert (tmp_path / "toy" / "sam.json").exists()
    assert not (tmp_path / "toy" / "base.json").exists()
    assert "1 cells made" in capsys.readouterr().out


def test_accuracy_loss_and_calibration_by_hand():
    """Four examples of two weights; the bins of 0.8 and 0.6 are too unsure and too sure."""
    confident, unsure = np.log([0.8, 0.2]), np.log([0.6, 0.4])
    logits = jnp.array([confident, confident, unsure, unsure])
    split = {"y": jnp.array([0, 1, 0, 1]), "weight": jnp.array([1.6, 0.2, 0.5, 1.7])}
    found = {name: float(x) for name, x in runs.of_logits(logits, split).items()}
    assert found["accuracy"] == pytest.approx((1.6 + 0.5) / 4)
    losses = -np.log([0.8, 0.2, 0.6, 0.4])
    assert found["loss"] == pytest.approx(np.mean(losses * [1.6, 0.2, 0.5, 1.7]))
    gaps = abs(1.6 * 0.2 - 0.2 * 0.8), abs(0.5 * 0.4 - 1.7 * 0.6)
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 4)


@pytest.mark.parametrize("main", ["accuracy", "loss"])
def test_numbers_are_chosen_on_validation_examples(main):
    """The best candidate is that of the highest accuracy, or of the lowest loss, on that split."""

    def result(candidate, train, split):
        is_validation = len(split["y"]) == 8
        score = -abs(np.log(candidate[0] / 0.2)) - abs(candidate[1] - 0.1)
        return {"accuracy": score, "loss": -score} if is_validation else dict.fromkeys((main,), 0)

    def run_all(seeds, candidates, steps, look, what):
        assert min(seeds) >= 1000
        found = [look(candidate, data(seed)) for candidate in candidates for seed in seeds]
        return np.array(found), np.zeros(len(found))

    method = SimpleNamespace(
        task=TOY._replace(main=main), row="sam", functions=SimpleNamespace(result=result)
    )
    method.run = run_all
    tried, best = protocol.choose(method, 6, 16)
    assert best == (0.2, 0.1)
    assert len(tried) >= 16


def test_a_network_may_start_from_weights_of_its_own():
    """Such as those of a training with its seed, which is made once."""
    start = cache(lambda seed: runs.make_functions(TOY).init(seed))
    trainer = runs.make_trainer(TOY._replace(start=start), "base")
    run = protocol.one_run(0, (0.1, 0.0))
    assert jax.tree.leaves(trainer.init(6, run, start(0)))


def test_every_seed_has_random_numbers_of_its_own():
    """So that a method's luck is not the same in all of them, nor in the tuning."""
    trainer, params = runs.make_trainer(TOY, "rwp"), runs.make_functions(TOY).init(0)
    states = [trainer.init(6, protocol.one_run(seed, (0.1, 0.1)), params) for seed in (1, 2)]
    one, other = (optax.tree.get(state, "key") for state in states)
    assert not np.array_equal(one, other)


def test_m_sharpness_takes_examples_of_all_kinds_together(monkeypatch):
    """A task may begin with the wrong labels, and have its classes one after the other."""
    seen = {}
    monkeypatch.setattr(runs.samx.sharpness, "objective", lambda **given: seen.update(given))
    for name in ("eigenvalues", "trace", "worst_case", "m_sharpness"):
        one = SimpleNamespace(values=[0], mean=0, value=0)
        monkeypatch.setattr(runs.samx.sharpness, name, lambda *_, one=one, **__: one)
    labels = np.repeat([0, 1], 50)
    task = TOY._replace(num_train=100, measured=40)
    runs.sharpness(task, None, None, {"y": labels})
    assert len(seen["batch"]["y"]) == 40
    for shard in (slice(0, 20), slice(20, 40)):
        assert 5 <= seen["batch"]["y"][shard].sum() <= 15


def test_text_counts_every_token():
    logits = jnp.log(jnp.array([[[0.9, 0.1], [0.3, 0.7]]]))
    found = runs.of_logits(logits, {"y": jnp.array([[0, 0]])})
    assert float(found["accuracy"]) == pytest.approx(0.5)
    assert float(found["loss"]) == pytest.approx(-np.log([0.9, 0.3]).mean())


def test_batch_norm_uses_all_training_examples_in_the_end():
    """A test example's logits do not depend on the others of its split."""
    functions = runs.make_functions(TOY)
    params, splits = functions.init(0), data(0)
    x, train = splits.test["x"], splits.train["x"]
    kernel, bias = (np.asarray(params["first"][name]) for name in ("kernel", "bias"))
    hidden, seen = x @ kernel + bias, train @ kernel + bias
    features = np.maximum(0, (hidden - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + 1e-5))
    logits = features @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    wanted = runs.of_logits(jnp.asarray(logits), splits.test)
    found = functions.result(params, splits.train, splits.test)
    assert float(found["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)


def test_a_step_never_mixes_epochs():
    """Two whole batches of 4 fit into 10 examples; in an epoch no example comes twice."""
    batches = runs.batches_of(TOY, 0, 5)
    assert batches.shape == (5, 4)
    assert [len(np.unique(batches[i : i + 2])) for i in (0, 2)] == [8, 8]
    assert not np.array_equal(batches, runs.batches_of(TOY, 1, 5))


def test_finalists_are_in_the_interior():
    grid = itertools.product((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0))
    tried = {(x, y): -abs(x - 3) - 2 * abs(y - 2) for x, y in grid}
    assert protocol.finalists_of(tried) == [(3, 2), (2, 2)]


def test_rows_of_the_tasks():
    """Every variant of the registry; rows for rare classes where there are some."""
    plain, tail = (variants_of(TASKS[name]) for name in ("digits-noisy", "digits-long-tail"))
    assert {*tail} - {*plain} == {"focal-sam", "imb-sam"}
    assert [*plain][:2] == ["base", "base2x"]
    assert len(plain) > 60
    assert "sampa-separate" not in plain
    assert "sam-on" in variants_of(TASKS["mnist1d"])
    tails = {name: tail_of(task.counts).tolist() for name, task in TASKS.items() if task.counts}
    assert tails == {"digits-long-tail": [4, 5, 6, 7, 8, 9], "tabular": [1]}
