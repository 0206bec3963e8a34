"""AdaSAM's language task: its snippets, and what the script writes."""

import numpy as np

from examples.claims import snippets, task_rows


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    rows = {row: snippets.ROWS[row] for row in ("sgd", "adasam")}
    monkeypatch.setattr(snippets, "ROWS", rows)
    monkeypatch.setattr(snippets, "TRAIN", 100)
    monkeypatch.setattr(snippets, "OTHERS", 40)
    snippets.data.cache_clear()
    results = snippets.main(["--seeds", "2", "--steps", "2", "--out", "results"])
    snippets.data.cache_clear()
    assert [result["gradients"] for result in results.values()] == [2, 4]
    report = read_report(in_empty_folder / "results")
    verdicts = {row["name"]: row["verdict"] for row in report["claims"]}
    assert verdicts["over-sam"] == "not testable here"  # it was not trained
    [sgd, adasam] = (result["measures"]["test_accuracy"] for result in results.values())
    np.testing.assert_allclose(report["values"]["over-sgd"], 100 * np.subtract(adasam, sgd))
    assert (in_empty_folder / "results" / "snippets.png").stat().st_size > 10_000
    assert "test accuracy, %" in capsys.readouterr().out


def test_parts_of_a_file_do_not_overlap_and_a_label_is_that_of_the_file(monkeypatch):
    """A file of one byte has one trigram; in a file of the bytes 0, 1, 2, ... each is its place."""
    whole = [np.full(1000, label, np.uint8) for label in range(len(snippets.MODULES))]
    monkeypatch.setattr(snippets, "sources", lambda: whole)
    found = snippets.snippets_of(np.random.default_rng(0), 1, 16)
    expected = [label * (256**2 + 256 + 1) % snippets.TRIGRAMS for label in found["y"].tolist()]
    assert (found["x"] == np.array(expected)[:, None]).all()
    assert sorted(found["y"]) == sorted([*range(8)] * 2)

    starts = []
    places = [np.arange(250).astype(np.uint8)] * len(snippets.MODULES)
    monkeypatch.setattr(snippets, "sources", lambda: places)
    monkeypatch.setattr(snippets, "LENGTH", 4)
    for part, (low, high) in enumerate(snippets.PARTS):
        starts.clear()
        monkeypatch.setattr(snippets, "trigrams", lambda rows: starts.append(rows) or rows)
        snippets.snippets_of(np.random.default_rng(1), part, 400)
        assert low * 250 <= starts[0].min() <= starts[0].max() < high * 250


def test_the_chosen_pair_trains_the_reported_seeds(monkeypatch):
    """Of two candidates the second one was chosen."""
    task, calls = snippets.task_of("adamw", 3, 10), []

    class Method:
        def __init__(self, *given):
            self.result = "look"

        def run(self, seeds, candidates, steps, look, what):
            calls.append((list(seeds), candidates, steps, look))
            return {"test_accuracy": np.array([0.5, 0.6, 0.7])}, np.array([10.0, 10.0, 13.0])

    tried = {(0.1, 0.0): 0.4, (0.3, 0.2): 0.5}
    monkeypatch.setattr(task_rows, "Method", Method)
    monkeypatch.setattr(task_rows, "make_trainer", lambda *of: None)
    monkeypatch.setattr(task_rows, "make_functions", lambda *of: None)
    monkeypatch.setattr(task_rows, "choose", lambda *of: (tried, (0.3, 0.2)))
    found = task_rows.train_rows({"adamw": task}, [("adamw", "sam")], 10)["adamw", "sam"]
    assert calls == [([0, 1, 2], [(0.3, 0.2)], 10, "look")]
    assert (found["learning_rate"], found["rho"], found["gradients"]) == (0.3, 0.2, 11.0)
    assert found["measures"]["test_accuracy"] == [0.5, 0.6, 0.7]
