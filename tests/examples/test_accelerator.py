"""accelerator.py: the smoke run with few packages, what stops it and how it goes on, what fails."""

import os
import re
import subprocess
import sys
import threading
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import samx
from examples.common import measuring, shapes
from examples.common.steps import Row
from examples.devices import accelerator, accelerator_parts, accelerator_report

ROOT = Path(__file__).parents[2]
# Run the script where the packages that it must not need cannot be imported.
BARE = """
import runpy, sys
sys.modules |= dict.fromkeys(sys.argv[1].split())
sys.argv = sys.argv[2:]
{}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NOT_NEEDED = "filelock grain tensorboardX tqdm psutil pytest ray equinox numpyro"
TRAJECTORIES = ("sampa__sgdm_lam0.2_rho0.1", "msam__sgdm_k4")
KINDS = (accelerator.REFERENCES[0], "sam")
# What compiles fast: some rows, one layer of the language model, and networks for images without
# their blocks. One part has the plain step. Memory and figures have tests of their own.
SMALLER = f"""
from examples.common import figures, vision
from examples.devices import accelerator_parts as parts
figures.STYLE["figure.constrained_layout.use"] = False
parts.FED.pop("plain")
vision.ResidualBlock = lambda *args: lambda x: x
vit = vision.ViT
vision.ViT = lambda *args, **sizes: vit(*args, **sizes | {{"depth": 0}})
parts.TRAJECTORIES = {{name: parts.TRAJECTORIES[name] for name in {TRAJECTORIES}}}
group_of, memory, by_size = parts.group_of, parts.memory, parts.sampa_by_size
language_problem = parts.language_problem
kinds = iter([{KINDS}])
def fewer(problem, names, **labels):
    wanted = names if labels else next(kinds, {KINDS[1:]})
    return group_of(problem, [n for n in names if n in wanted] or names, **labels)
def one_size(model, scale):
    return by_size(model, scale._replace(sizes={{model: scale.sizes[model][-1:]}}))
parts.group_of, parts.sampa_by_size = fewer, one_size
parts.language_problem = lambda size, *args: language_problem(size._replace(depth=1), *args)
def one_row(scale):
    size, examples = scale.language
    return memory(scale._replace(held=scale.held[:1], language=(size._replace(depth=1), examples)))
parts.memory = one_row
"""


@pytest.mark.parametrize(
    ("smaller", "trajectories", "kinds"),
    [
        pytest.param(SMALLER, TRAJECTORIES, KINDS, id="some"),
        pytest.param(
            *("", accelerator_parts.TRAJECTORIES, accelerator.KINDS),
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_tiny_run_with_few_packages(smaller, trajectories, kinds, in_empty_folder, read_report):
    options = [ROOT / "examples" / "devices" / "accelerator.py", "--smoke", "--out", "results"]
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(smaller), NOT_NEEDED, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder, scale = in_empty_folder / "results", accelerator.SMOKE
    report = read_report(folder)
    names = [part.name for part in accelerator.all_parts(scale)]
    assert [*report["parts"]] == names
    assert all("failed" not in row for rows in report["parts"].values() for row in rows)
    assert [row["row"] for row in report["parts"]["fidelity"]] == [*trajectories]
    assert all(row["passed"] for row in report["parts"]["fidelity"])
    assert [row["row"] for row in report["parts"]["dense float32"]] == [*kinds]
    for row in report["parts"]["images"]:
        assert row["images_per_second"] == pytest.approx(row["batch"] / (row["ms"] / 1e3))
    for row in report["parts"]["memory"]:  # here the device's compiler is the CPU's
        assert row["predicted_bytes"] / row["compiled_bytes"] == pytest.approx(1, rel=0.2)
    assert {"jax", "jaxlib", "flax", "optax", "samx"} <= report["versions"].keys()
    assert [row["part"] for row in report["plan"]] == names
    assert all(row["seconds"] > 0 for row in report["plan"])
    assert (folder / "accelerator.png").stat().st_size > 10_000
    table = (folder / "table.txt").read_text()
    count = len(trajectories)
    for text in (*names, *kinds, f"{count} of {count} trajectories", "ascent batch for these"):
        assert text in table
    for text in ("plan for 8 minutes", "in all", "took", "in short", "results.json"):
        assert text in done.stdout


@pytest.fixture
def run(in_empty_folder, monkeypatch, capsys):
    """Return a function that runs some parts and returns the rows and what was printed."""
    before = jax.config.read("jax_disable_most_optimizations")
    clock = [0.0]
    monkeypatch.setattr(accelerator.time, "perf_counter", lambda: clock[0])

    def run(*parts, arguments="", draw=None):
        def all_parts(scale):
            return [
                accelerator.Part(name, seconds, partial(work, *result), accelerator_report.STEPS)
                for name, seconds, *result in parts
            ]

        def work(result, took, scale):
            clock[0] += took
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(accelerator, "all_parts", all_parts)
        monkeypatch.setattr(accelerator_report, "draw", lambda *args: None)
        clock[0] = 0.0
        rows = accelerator.main(["--smoke", "--out", "results", *arguments.split()])
        return rows, capsys.readouterr().out

    yield run
    jax.config.update("jax_disable_most_optimizations", before)


ROWS = [{"row": "plain", "ms": 1.0, "ratio": [1.0, 1.0, 1.0], "seconds": [0.001]}]


def test_what_does_not_fit_is_left_for_the_next_call(run, read_report, in_empty_folder):
    parts = [("first", 10, ROWS, 5), ("large", 100, ROWS, 90), ("last", 20, ROWS, 20)]
    rows, out = run(*parts, arguments="--minutes 1")
    assert [*rows] == ["first", "last"]
    assert "left: large; the same command goes on with them" in out
    assert "130  in all" in out
    plan = read_report(in_empty_folder / "results")["plan"]
    assert [(row["planned_seconds"], row["seconds"]) for row in plan] == [
        (10, 5),
        (100, None),
        (20, 20),
    ]
    rows, out = run(*parts)
    assert {*rows} == {"first", "large", "last"}
    assert "took 90 s, planned 100 s" in out
    assert "2 parts are done" in out
    assert "took 5 s" not in out  # it was not run again
    assert "left" not in out.split("in short")[1]
    assert (in_empty_folder / "results" / "table.txt").read_text().startswith("first\n")


def test_estimates_grow_with_what_was_measured(run):
    rows, out = run(("one", 10, ROWS, 30), ("two", 15, ROWS, 15), arguments="--minutes 1")
    assert [*rows] == ["one"]  # 15 s would be 45 s at this pace, and 30 s are left
    assert "left: two" in out


def test_an_interrupted_part_is_run_again_after_the_others(run, capsys):
    bad = KeyboardInterrupt()
    with pytest.raises(SystemExit) as stop:
        run(("one", 1, ROWS, 1), ("two", 1, bad, 1), ("three", 1, ROWS, 1))
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted in two; the same command goes on\n"
    rows, out = run(("one", 1, ROWS, 1), ("two", 1, ROWS, 1), ("three", 1, ROWS, 1))
    assert [*rows] == ["one", "three", "two"]
    assert "1 parts are done" in out


def test_a_part_that_fails_stops_no_other_and_can_be_retried(run):
    bad = RuntimeError("RESOURCE_EXHAUSTED: out of memory\nsecond line")
    rows, out = run(("bad", 1, bad, 1), ("good", 1, ROWS, 1))
    reason = "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert rows["bad"] == [{"row": "bad", "failed": reason}]
    assert rows["good"] == ROWS
    assert f"failed: {reason}" in out
    assert "--retry" in out
    parts = [("bad", 1, ROWS, 1), ("good", 1, bad, 1)]
    rows, _ = run(*parts)  # both are done
    assert "failed" in rows["bad"][0]
    rows, out = run(*parts, arguments="--retry")
    assert rows == {"bad": ROWS, "good": ROWS}
    assert "--retry" not in out


def test_results_of_another_device_are_not_continued(run, in_empty_folder, capsys):
    run(("one", 1, ROWS, 1))
    path = in_empty_folder / "results" / "results.json"
    path.write_text(path.read_text().replace('"device": "cpu', '"device": "tpu'))
    with pytest.raises(SystemExit):
        run(("one", 1, ROWS, 1))
    error = " ".join(capsys.readouterr().err.split())
    assert re.search("--out: results was measured with device tpu.*choose another folder", error)


def test_times_relative_to_the_plain_step():
    row = measuring.time_of([0.2, 0.4, 0.9], [0.1, 0.1, 0.3])
    assert row["ms"] == pytest.approx(400)
    assert row["ratio"] == pytest.approx([2.5, 3, 3.5])
    assert measuring.time_of([0.2], None)["ratio"] is None


def test_a_row_that_fails_stops_no_other(capsys):
    """It fails when it is lowered, when it first runs, and in the middle of the rounds."""

    def step(params, state, batch):
        return params * 1.5, state, batch["x"].sum()

    def not_lowered(params, state, batch):
        raise ValueError("no such step\nmore")

    def not_run(params, state, batch):
        def fail(x):
            raise RuntimeError("on the device")

        found = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), params[0])
        return params, state, found

    rows = {
        "not lowered": Row(not_lowered, jnp.zeros_like, 1),
        "plain": Row(step, jnp.zeros_like, 1),
        "not run": Row(not_run, jnp.zeros_like, 1),
        "other": Row(step, jnp.zeros_like, 1, cycle=5),
    }
    batch = {"x": jnp.ones(3)}
    group = accelerator_parts.Group(rows, jnp.ones(4), batch, {"batch": 3})
    results = accelerator_parts.time_groups([group], accelerator.SMOKE)
    assert [row["row"] for row in results] == [*rows]
    first, plain, third, other = results
    assert first["failed"] == "ValueError: no such step"
    assert "failed" in third
    assert plain["ratio"] == [1, 1, 1]
    assert len(other["seconds"]) == accelerator.SMOKE.rounds
    assert other["peak_bytes"] > 0
    assert all(row["batch"] == 3 for row in results)
    assert "compiled 3 of 4 rows" in capsys.readouterr().out


def test_a_program_that_never_compiles_is_not_waited_for(monkeypatch):
    is_over = threading.Event()
    slow = types.SimpleNamespace(compile=lambda: is_over.wait(30))
    fast = types.SimpleNamespace(compile=lambda: "a program")
    monkeypatch.setattr(measuring, "MOST_SECONDS", 0.1)
    found = measuring.compile_all({"slow": lambda: [slow], "fast": lambda: [fast, fast]})
    is_over.set()
    assert found == ({"fast": ["a program"] * 2}, {"slow": "not compiled within 0.1 s"})


def test_rounds_go_on_without_a_row_that_fails():
    calls = []

    def fails_later():
        calls.append(1)
        return 1.0 if len(calls) < 2 else 1 / 0

    found, failed = measuring.in_rounds({"good": lambda: 2.0, "bad": fails_later}, 4)
    assert found == {"good": [2.0] * 4}
    assert failed == {"bad": "ZeroDivisionError: division by zero"}
    assert len(calls) == 2


@pytest.mark.parametrize("scale", [accelerator.FULL, accelerator.SMOKE])
def test_every_part_is_planned_and_can_fail(scale, tmp_path):
    """Each part has an estimate, and every table, note and panel takes rows that failed."""
    for part in accelerator.all_parts(scale):
        assert part.seconds > 0
        rows = [{"row": name, "batch": 1, "failed": "no memory"} for name in ("plain", "sampa")]
        text = accelerator_report.table(part.name, part.shown, rows)
        assert text.count("failed: no memory") == 2
        assert accelerator_report.panels_of({part.name: rows}) == []
    assert sum(part.seconds for part in accelerator.all_parts(scale)) < 8 * 60
    assert len(scale.trajectories) == 12


def test_fidelity_sees_another_radius(monkeypatch):
    name = "sam__sgdm_rho0.5"
    other = {name: lambda batch: optax.chain(samx.sam(0.49), optax.sgd(0.1, momentum=0.9))}
    monkeypatch.setattr(accelerator_parts, "TRAJECTORIES", other)
    scale = accelerator.SMOKE._replace(trajectories=(name, "no such run"))
    row, unknown = accelerator_parts.fidelity(scale)
    assert not row["passed"]
    assert 1e-4 < row["highest"] < 1e-1
    assert unknown["failed"] == "KeyError: 'no such run'"


def test_memory_of_a_device_beside_the_cpu(monkeypatch):
    """The prediction is for another device; the allocator knows its largest use only."""
    cpu, device = jax.devices("cpu")[:2]
    monkeypatch.setattr(jax, "devices", lambda kind=None: [device] if kind is None else [cpu])
    make_task, places = shapes.make_task, []

    def noted(*args, devices, **keywords):
        places.extend(devices)
        return make_task(*args, devices=devices, **keywords)

    monkeypatch.setattr(shapes, "make_task", noted)
    peaks = iter([10, 20, 20, 20])
    monkeypatch.setattr(accelerator_parts, "allocated_bytes", lambda device: next(peaks))
    with jax.default_device(device), jax.numpy_rank_promotion("allow"):
        size, examples = accelerator.SMOKE.language
        language = size._replace(depth=1), examples
        scale = accelerator.SMOKE._replace(held=("sgd", "adamw"), language=language)
        sgd, adamw = accelerator_parts.memory(scale)
    assert sgd["predicted_bytes"] / sgd["compiled_bytes"] == pytest.approx(1, rel=0.2)
    assert sgd["predicted_bytes"] < adamw["predicted_bytes"]
    assert places == [device, cpu] * 2
    assert sgd["allocated_bytes"] == 20
    assert adamw["allocated_bytes"] is None  # not above what was in use before


def test_bfloat16_is_the_dtype_of_the_computation():
    for dtype, wanted in (("float32", False), ("bfloat16", True)):
        losses_fn, params, batch = accelerator_parts.dense_problem(4, dtype, 2)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        jaxpr = jax.make_jaxpr(losses_fn)(params, batch)
        products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        assert {eqn.outvars[0].aval.dtype == jnp.bfloat16 for eqn in products} == {wanted}
        assert jaxpr.out_avals[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--minutes 0", "--minutes must be finite and above 0, got 0.0"),
        ("--minutes nan", "--minutes must be finite and above 0, got nan"),
        ("--minutes x", "argument --minutes: invalid float value"),
        ("", "jax sees no accelerator, only the CPU; --smoke runs there"),
        ("--smoke --out taken", "--out: taken is not empty, and no results of accelerator.py"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    before = jax.config.read("jax_disable_most_optimizations")
    try:
        assert message in refusal(accelerator.main, arguments)
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
