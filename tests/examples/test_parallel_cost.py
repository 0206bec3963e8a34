"""The example that counts what each device does: counts, formulas, and what it refuses."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.common.models import MODELS, as_problem
from examples.common.programs import communicated_bytes
from examples.devices import parallel_cost


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """Of a narrow model: the arrays that are sent and kept are as many as the formulas say."""
    narrow = MODELS["dense"]._replace(make=MODELS["dense"].narrow)
    monkeypatch.setattr(parallel_cost, "problem", lambda model, size: as_problem(narrow, size))
    monkeypatch.setattr(parallel_cost, "LEAST_SECONDS", 1e-3)
    arguments = "--batch 4 --devices 2 --repeats 1 --out cost"
    results = parallel_cost.main(arguments.split())
    assert [result["method"] for result in results] == [*parallel_cost.METHODS]
    for result in results:
        wanted, found = result["formula"], result["counted"]
        assert found["sent"] == pytest.approx(wanted["sent"], abs=64)  # losses and norms
        assert found["state"] == pytest.approx(wanted["state"], abs=64)
    assert (in_empty_folder / "cost" / "parallel_cost.png").stat().st_size > 10_000
    report = read_report(in_empty_folder / "cost")
    assert report["counts"] == results
    assert [row["share"] for row in report["times"]] == [2, 1]
    printed = capsys.readouterr().out
    for text in (*parallel_cost.METHODS, "T(2B/n) + 2P", "Where two groups lead", "results.json"):
        assert text in printed


@pytest.mark.slow
def test_parallel_cost_counts_what_the_formulas_say(in_empty_folder, capsys, read_report):
    results = parallel_cost.main(
        ["--batch", "256", "--devices", "2", "4", "--repeats", "1", "--out", "cost"]
    )
    assert len(results) == 2 * len(parallel_cost.METHODS)
    for result in results:
        wanted, found = result["formula"], result["counted"]
        assert found["sent"] == pytest.approx(wanted["sent"], rel=1e-4)
        assert found["flops"] == pytest.approx(wanted["flops"], rel=0.07)  # plus O(P) work
        assert found["state"] == pytest.approx(wanted["state"], rel=1e-3)
        # A bound: XLA reuses memory, SAMPa needs 0.61 of it.
        assert 0.5 <= found["temporary"] / wanted["temporary"] <= 1.1
    assert (in_empty_folder / "cost" / "parallel_cost.png").stat().st_size > 10_000
    report = read_report(in_empty_folder / "cost")
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


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 16),
        ("{{0},{1}}", 0),
        ("[2,2]<=[4]", 16),
        ("[4,1]<=[4]", 0),
        ("{}", 16),
        ("mesh['a'=2,'one'=1] {'a','one'}", 16),
        ("mesh['a'=2,'one'=1], device_ids=([2]0,1) {'one'}", 0),
        ("mesh['a'=4] {'a':(1)2}", 16),
        ("mesh['a'=4] {'a':(1)1}", 0),
    ],
)
def test_groups_as_any_xla_prints_them(groups, size):
    line = f"  %r = f32[4]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    program = types.SimpleNamespace(
        as_text=lambda: f"ENTRY %main (x: f32[4]) -> f32[4] {{\n{line}\n}}"
    )
    assert communicated_bytes(program) == ({"all-reduce": size} if size else {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 12", r"--batch must be powers of two, got \[12\]"),
        ("--devices 2 3", r"--devices must be powers of two, got \[2, 3\]"),
        ("--devices 0", "--devices must be powers of two"),
        ("--batch 4", "--batch must be at least the number of devices, got 4"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--model mlp", "mlp.*dense"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(parallel_cost.main, arguments))
