"""The example that measures exchanges with the center: what it reports, and what it refuses."""

import numpy as np
import pytest

from examples.asynchronous import exchange_cost
from examples.common.files import SaveError


def test_a_tiny_run(in_empty_folder, capsys, read_report):
    arguments = "--millions 1 --engine threads --workers 1 2 --repeats 2 --out results"
    rows = exchange_cost.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert report["rows"] == rows
    assert report["settings"]["millions"] == 1
    assert [(row["engine"], row["workers"], row["shards"]) for row in rows] == [
        ("threads", 1, 1),
        ("threads", 2, 1),
    ]
    for row in rows:
        assert min(row["milliseconds"]) > 0
        own, with_shared = row["megabytes"]["driver"]
        assert 4 < own <= with_shared  # at least the parameters, 4 MB
    assert (in_empty_folder / "results" / "exchange_cost.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("device:", "1 million float32 parameters", "driver MB", "Plot:"):
        assert text in printed


def test_the_table_has_quartiles_and_both_sizes():
    row = {"engine": "ray", "workers": 2, "shards": 1, "milliseconds": [1.0, 2.0, 3.0, 4.0, 5.0]}
    row["megabytes"] = {"center": [10.0, 20.0], "driver": [30.0, 40.0]}
    wanted = ("ray", "2", "1", "3 [2, 4]", "10 (20)", "", "30 (40)")
    assert exchange_cost.cells(row) == wanted
    memory = exchange_cost.Memory()
    memory.look("nobody", 2**22)  # there is no such process
    assert memory.largest == {}


def test_the_workers_change_nothing(tmp_path):
    worker = exchange_cost.exchanging(1, tmp_path)(3)
    params, state, loss = worker.step(worker.params, None, 0)
    assert (state, loss) == (None, 0.0)
    assert sum(leaf.size for leaf in params.values()) == 1_000_000
    batches = iter(worker.batches(5))
    assert [next(batches) for _ in range(3)] == [5, 6, 7]
    assert len(np.load(tmp_path / "3.npy")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--millions 0", "--millions must be at least 1, got 0"),
        ("--workers 1 0", "--workers must be at least 1, got 0"),
        ("--shards -1", "--shards must be at least 1, got -1"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--engine processes", "argument --engine: invalid choice"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(exchange_cost.main, arguments)


def test_times_that_could_not_be_written_are_named(tmp_path):
    np.save(tmp_path / "0.npy", [1.0, 2.0, 4.0, 8.0])
    np.testing.assert_array_equal(exchange_cost.read_times(tmp_path, 1), [4.0])
    for content in (None, b"", b"\x93NUMPY"):
        if content is not None:
            (tmp_path / "1.npy").write_bytes(content)
        with pytest.raises(SaveError, match=r"1\.npy: the times of worker 1 could not be"):
            exchange_cost.read_times(tmp_path, 2)
