import json
import re
from pathlib import Path

import pytest

import samx
from examples.cost import lean

SMALL = "--width 16 --rows 50 --layers 2 --leaves 1 --rounds 2 --compiled 1"


def test_a_tiny_run(tmp_path, capsys, monkeypatch):
    """All tables; with this version as the one before too, where rows of both are compared."""
    monkeypatch.setattr(lean, "SECONDS", 1e-3)
    monkeypatch.setattr(lean, "DTYPES", lean.DTYPES[:1])
    before = Path(samx.__file__).parents[1]
    of_both = ["--models", "embedding", "--variants", "gsam", "--tables", "bytes", "peak"]
    of_both += ["--before", str(before), "--out", str(tmp_path / "run")]
    of_this = ["--models", "dense 16", "--tables", "sent", "time", "trace"]
    results = lean.main([*SMALL.split(), *of_both])
    others = lean.main([*SMALL.split(), *of_this, "--out", str(tmp_path / "other")])
    out = capsys.readouterr().out
    assert {*results, *others} == {*lean.TABLES}
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["bytes"] == results["bytes"]
    assert (tmp_path / "run" / "lean.png").stat().st_size > 5000
    for name, table in results.items():
        for key in ("bytes", "peak"):
            values = {row["row"]: row[key] for row in table if key in row and name == "peak"}
            assert values.get("gsam") == values.get("gsam before")
    results |= others
    sent = {row["row"]: row.get("sent") for row in results["sent"]}
    assert sent["msam, vmap, global"] > 2 * sent["sam, global"]
    assert sent["msam, vmap, local"] < sent["sam, global"]
    flops = {row["row"]: row.get("megaflops") for row in results["sent"]}
    assert flops["ksam, jit"] < flops["sam, jit"]
    quartiles = next(row["ratio"] for row in results["time"] if row["row"] == "sam")
    assert quartiles == sorted(quartiles)
    assert {"trace", "lower", "compile", "call, ms"} <= results["trace"][0].keys()
    for text in ("by hand", "sam before", "sam, all readings", "sampa"):
        assert (text in out) == (text != "sampa")


def test_this_process_keeps_its_own_version(tmp_path):
    (tmp_path / "samx").mkdir()
    (tmp_path / "samx" / "__init__.py").write_text("from samx import part\n")
    (tmp_path / "samx" / "part.py").write_text("number = 3\n")
    with lean.version_in(tmp_path) as older:
        assert older.part.number == 3
    import samx as current

    assert current is samx
    assert not hasattr(current, "part")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--before nowhere", "--before must be a folder that holds samx/, got nowhere"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--tables byte", "byte.*choose from"),
        ("--leaves 0", "--leaves must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(lean.main, arguments))
