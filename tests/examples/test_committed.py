"""Claims that committed results answer: the right rows, pairs, signs and units."""

import numpy as np
import pytest

from examples.claims import committed
from examples.claims.claim import HOLDS
from samx.catalog.table import ENTRIES


def test_a_tiny_run(in_empty_folder, capsys):
    found = committed.main(["--out", "results"])
    assert [one.name for one in found] == list(committed.CLAIMS)
    text = capsys.readouterr().out
    assert "equal gradients, clean labels" in text
    assert (in_empty_folder / "results" / "committed.png").stat().st_size > 10_000
    assert (in_empty_folder / "results" / "results.json").exists()


def test_every_claim_has_a_number_and_a_system_of_the_catalog():
    names = {entry.name for entry in ENTRIES}
    found = committed.committed()
    assert not [one.name for one in found if not np.isfinite(one.number.value)]
    assert {system for one in found for system in one.claim.systems} <= names


def test_accuracies_are_paired_and_in_points():
    found = committed.values()["sam, 30% wrong labels"]
    sam, base = (committed.rows()[row, 0.3]["test_accuracy"] for row in ("sam", "base"))
    assert found[7] == pytest.approx(100 * (sam[7] - base[7]))
    assert committed.difference("base", "sam", 0.3)[7] == pytest.approx(-found[7])


def test_what_claims_more_than_sam_is_level_only_in_both_tables():
    found = {one.name: one for one in committed.committed()}
    for row in committed.level_of(list(found.values())):
        for labels in committed.LABELS.values():
            number = found[f"{row}, {labels}"].number
            assert -committed.MARGIN < number.low < number.high < committed.MARGIN


def test_flatness_of_sam_is_a_ratio_in_powers_of_ten():
    one = committed.compared()["digits-noisy"]
    ratio = one["sam"].measure("top_eigenvalue")[3] / one["base"].measure("top_eigenvalue")[3]
    found = committed.values()["sam-top-eigenvalue, 30% wrong labels"]
    assert 10 ** found[3] == pytest.approx(ratio)


def test_a_higher_loss_in_fine_tuning_counts_against_a_method():
    """Bi-LoRA's loss on the new text is higher than AdamW's in the committed table."""
    number = committed.tuned()["bi-lora-language"]
    assert number.low < number.value < number.high < 0


def test_clean_labels_do_not_judge_who_wants_to_be_level():
    names = committed.said_claims()
    assert "looksam, 30% wrong labels" in names
    assert "looksam, clean labels" not in names
    assert "asam, clean labels" in names
    sam = {one.name: one for one in committed.committed()}["sam, 30% wrong labels"]
    assert sam.verdict == HOLDS
