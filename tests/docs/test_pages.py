"""The pages of the book hold what the package says, and the citation file is right."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from fake_cells import fake_tasks, write_cells

import samx

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "notebooks"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write = load(BOOK / "_pages" / "write.py")
measured = load(BOOK / "_pages" / "measured.py")
PAGES = write.pages()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_generator_writes(name):
    text = (BOOK / name).read_text()  # of the README too
    message = f"{name} is out of date: python notebooks/_pages/write.py"
    assert text == write.fill(text, PAGES[name]), message


def test_a_page_without_its_part_is_an_error():
    with pytest.raises(ValueError, match="begin table"):
        write.fill("<!-- begin table -->\n", {"table": "| a |"})


def test_every_variant_has_one_card():
    headings = re.findall(r"^### (.+)$", PAGES["methods.md"]["cards"], re.MULTILINE)
    assert sorted(headings) == sorted(entry.name for entry in samx.catalog())


def test_every_variant_is_in_one_table_of_fidelity():
    rows = re.findall(r"^\| \[(\w+)\]", "\n".join(PAGES["fidelity.md"].values()), re.MULTILINE)
    assert sorted(rows) == sorted(entry.name for entry in samx.catalog())


def test_the_table_of_methods_fits_a_phone():
    """Three columns without long words: a word that cannot break widens its column."""
    for line in PAGES["methods.md"]["table"].splitlines():
        cells = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell) for cell in line.strip("| ").split(" | ")]
        assert len(cells) <= 3
        assert max(len(word) for cell in cells for word in re.split(r"[ /-]", cell)) <= 20, line


def test_a_card_builds_its_optimizer():
    """The line on the card: the names are those of `samx`, and the base stands where it says."""
    lines = {entry.name: write.build(entry) for entry in samx.catalog()}
    assert lines["looksam"] == "optax.chain(samx.looksam(rho=0.05, period=5, alpha=0.1), base)"
    assert lines["momentum_sam"] == "samx.momentum_sam(base, rho=3.0)"
    assert lines["g_rst"] == (
        "optax.chain(samx.perturb_if(samx.policies.random(0.5), "
        "samx.combinations.mix(samx.sam(0.05), 2.0)), base)"
    )


def test_measured_radii_come_from_results(tmp_path, monkeypatch):
    """The file is what its script writes, and new results change their own variants only."""
    old, new = measured.TARGET.read_text(), tmp_path / "measured.py"
    monkeypatch.setattr(measured, "TARGET", new)
    measured.main([str(ROOT / "examples/compare/results/digits.json")])
    assert new.read_text() == old
    rows = [("base", 0.3, 0.0), ("look-layer-sam", 0.3, 0.01), ("look-layer-sam", 0.0, 0.003)]
    results = [{"row": row, "noise": noise, "rho": rho} for row, noise, rho in rows]
    report = {"settings": {"base": "adamw", "noise": 0.3}, "rows": results}
    (tmp_path / "results.json").write_text(json.dumps(report))
    measured.main([str(tmp_path / "results.json")])
    lines = set(new.read_text().splitlines()) - set(old.splitlines())
    [line] = lines
    assert line.startswith('    "look_layer_sam": {"adamw": (0.01, 0.003), "momentum": (')


@pytest.fixture
def of_made_up_results(tmp_path, monkeypatch):
    """Let the pages read other cells, and an empty folder of figures."""
    rows = [*write.SHOWN, "lpf-sgd"]
    write_cells(tmp_path / "cells", fake_tasks(["digits-noisy", "digits-clean"], rows))
    monkeypatch.setattr(write, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(write, "FOLDER", tmp_path)
    monkeypatch.setattr(write, "SHARPNESS", tmp_path / "missing.json")
    write.compared.cache_clear()
    yield tmp_path
    write.compared.cache_clear()


def test_the_page_of_the_comparison_comes_from_cells(of_made_up_results):
    parts = write.comparison_parts()
    assert parts["gains"] == parts["sharpness"] == write.NOT_YET
    (of_made_up_results / "comparison.png").write_bytes(b"")
    assert write.comparison_parts()["gains"].endswith("](comparison.png)")
    assert "### digits, 30% of the labels wrong\n\n`digits-noisy`, 4 seeds: " in parts["tasks"]
    lines = parts["tasks"].splitlines()
    assert (
        "| method | test accuracy, % | gain over base2x | at equal time | step | lr | rho |"
        in lines
    )
    [first, _] = [line for line in lines if line.startswith("| sam | ")]
    assert re.search(r"\d\d\.\d\d \[[\d., ]+\] \| [+-]\d\.\d\d \[", first)
    assert "**tier 1, 2 tasks, 7 rows**" in parts["ranking"]
    assert "| [sam](methods.md#sam) | " in parts["ranking"]
    assert "- 14 cells" in parts["notes"]


def test_the_readme_takes_its_numbers_from_the_comparison(of_made_up_results):
    text = write.readme_parts()["digits"]
    cells = write.compared()["digits-noisy"]
    better = write.cells.better_baseline(cells)
    gain = 100 * (cells["sam"].scores - cells[better].scores).mean()
    assert f"at equal gradients: SAM is {gain:.2f} [" in text
    table = text[text.index("|") :].splitlines()
    assert len(table) == 2 + len(write.SHOWN)
    assert f" | {gain:+.2f} [" in next(line for line in table if line.startswith("| sam |"))
    assert table[-1].endswith(" | 2 |")


# What version 1.2.0 of the Citation File Format requires.
REQUIRED = {"authors", "cff-version", "message", "title"}


def test_the_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= REQUIRED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == "Apache-2.0"
    assert str(citation["version"]) == samx.__version__
    assert f"version = {{{samx.__version__}}}" in (ROOT / "README.md").read_text()
    assert [author["name"] for author in citation["authors"]] == ["The samx developers"]
    assert not {"doi", "url", "repository-code"} & citation.keys()  # nothing is invented
