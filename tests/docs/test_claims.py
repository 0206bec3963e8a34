"""The page of the claims: every script is on it, and verdicts come from committed numbers."""

import ast
import math
from pathlib import Path

import pytest

from examples.claims import claim
from notebooks._pages import claims
from samx.catalog.table import ENTRIES

FOLDER = Path(claim.__file__).parent
FOUND = claims.found_by_script()
LEAST_SYSTEMS = 30


def scripts_with_claims():
    """Return the names of the scripts that have a table of claims."""
    found = set()
    for path in FOLDER.glob("*.py"):
        names = {
            getattr(node, "id", None) or getattr(node, "name", None)
            for part in ast.parse(path.read_text()).body
            if isinstance(part, ast.Assign | ast.ImportFrom)
            for node in getattr(part, "targets", None) or part.names
        }
        if {"CLAIMS", "NAME"} <= names:
            found.add(path.stem)
    return found


def test_every_script_of_claims_is_on_the_page():
    assert {script.NAME for script in FOUND} == scripts_with_claims()


def test_thirty_systems_have_a_claim_that_was_measured():
    measured = {
        system
        for found in FOUND.values()
        for one in found
        if math.isfinite(one.number.value)
        for system in one.claim.systems
    }
    assert measured <= {entry.name for entry in ENTRIES}
    assert len(measured) >= LEAST_SYSTEMS


@pytest.mark.parametrize("script", FOUND, ids=lambda script: script.NAME)
def test_committed_numbers_belong_to_claims(script):
    """A claim that is not testable says why; a number without a claim would be lost."""
    for one in FOUND[script]:
        assert one.claim.text.endswith("."), one.name
        assert one.verdict != claim.UNTESTED or one.claim.why, one.name
    if (claim.RESULTS / f"{script.NAME}.json").exists():
        assert claim.read(script.NAME).keys() <= script.CLAIMS.keys()


def test_a_verdict_follows_the_numbers(monkeypatch):
    """Numbers on the other side of the bar give the other verdict, on the page too."""
    values = claim.read("exact")
    monkeypatch.setattr(claim, "read", lambda name: values | {"le-sam-rise": [1.0, 1.1]})
    [script] = [script for script in FOUND if script.NAME == "exact"]
    [one] = [one for one in claim.committed("exact", script.CLAIMS) if one.name == "le-sam-rise"]
    assert one.verdict == claim.FAILS
    assert "**does not hold here**" in claims.cells_of(one)[-1]
    assert "1.05 [1, 1.1]" in claims.cells_of(one)


def test_a_card_has_the_claims_of_its_method():
    [(_, one), *_] = claims.claims_of_systems()["bisam"]
    items = claims.on_card(claims.claims_of_systems()["bisam"])
    assert len(items) > 1
    assert any(one.claim.text in item and one.verdict in item for item in items)
    assert claims.on_card([]) == []
