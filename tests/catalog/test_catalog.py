"""The catalog is complete, correct and searchable."""

import inspect
import re
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import optax
import problem
import pytest

import samx
from examples.common import choices, registry
from samx.catalog.cards import CARDS, FAMILIES

ROOT = Path(__file__).parents[2]
ENTRIES = samx.catalog()
NAMES = [entry.name for entry in ENTRIES]
MADE_OF_OTHERS = {"periodic", "rst", "g_rst"}
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)


def factories():
    """The public functions that build a variant: those defined in `samx.variants`."""
    public = {name: getattr(samx, name) for name in samx.__all__}
    return {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and value.__module__.startswith("samx.variants.")
    }


def test_every_public_factory_has_one_row():
    assert len(NAMES) == len(set(NAMES))
    assert set(NAMES) - MADE_OF_OTHERS == factories()


@every_entry
def test_a_row_is_complete(entry):
    assert all(getattr(entry, field) != "" for field in entry._fields if field != "venue")
    assert re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv)
    assert 2014 <= entry.year <= 2100
    assert re.fullmatch(r"[a-z]+\d{4}[a-z0-9]*", entry.key)
    assert str(entry.year) in entry.key
    assert entry.url.endswith(entry.arxiv)
    assert (entry.evidence == "reconstructed") == ("reconstructed" in entry.fidelity.lower())
    assert entry.evidence != "authors" or entry.fidelity.startswith("matches")
    names = entry.authors.split(" and ")
    assert all(re.fullmatch(r"[^,.]+, [^,]+", name) for name in names)


@every_entry
def test_the_call_is_one(entry):
    """`call` names the function of the entry; the factory has these arguments and defaults."""
    name = entry.call.split("(")[0]
    assert entry.factory is getattr(samx, name)
    if entry.name in MADE_OF_OTHERS:
        return
    parameters = inspect.signature(entry.factory).parameters
    arguments = entry.call.removeprefix(f"{name}(").removesuffix(")").split(", ")
    for argument in arguments:
        keyword, _, value = argument.partition("=")
        assert keyword in parameters
        if value and value != "...":
            assert float(value) == float(parameters[keyword].default)
    required = {p.name for p in parameters.values() if p.default is p.empty}
    assert required <= {argument.partition("=")[0] for argument in arguments}


@every_entry
def test_the_tests_and_the_examples_have_it(entry):
    assert entry.name in {case.entry for case in cases.VARIANTS.values()}
    assert (entry.name.replace("_", "-") in registry.VARIANTS) != (entry.name in choices.ELSEWHERE)


@every_entry
def test_shape_and_closures_are_those_of_the_factory(entry):
    case = next(case for case in cases.VARIANTS.values() if case.entry == entry.name)
    (data, params) = problem.make(jnp.float32)
    tx = case.build()
    for missing in entry.closures:
        given = {keyword: KEYWORDS[keyword](data) for keyword in entry.closures}
        del given[missing]
        with pytest.raises(ValueError, match=f"`({missing}|value_fn)` is missing"):
            tx.update(params, tx.init(params), params, **given)


KEYWORDS = {
    "value_fn": lambda data: lambda params: problem.losses_fn(params, data).mean(),
    "losses_fn": lambda data: problem.losses_fn,
    "batch": lambda data: problem.batch_at(data, 0),
    "labels": lambda data: problem.batch_at(data, 0)["y"],
    "index": lambda data: jnp.arange(problem.BATCH_SIZE),
    "ascent_fn": lambda data: lambda params: problem.losses_fn(params, data).mean(),
    "training_fn": lambda data: lambda params: problem.losses_fn(params, data).mean(),
    "validation_fn": lambda data: lambda params: problem.losses_fn(params, data).mean(),
    "apply_fn": lambda data: problem.logits_of,
    "loss_on_logits": lambda data: problem.loss_on_logits,
    "features_fn": lambda data: problem.features_of,
    "head_fn": lambda data: problem.head_on,
}


@every_entry
def test_its_state_is_as_large_as_it_says(entry):
    """The state holds the stated copies of the parameters, not counting the state of the base."""
    case = next(case for case in cases.VARIANTS.values() if case.entry == entry.name)
    _, params = problem.make(jnp.float32)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = jax.eval_shape(case.build(optax.sgd(0.1, momentum=0.9)).init, params)
    floating = [x.size for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    held = re.match(r"(\d+) P", entry.state)
    copies = (int(held[1]) if held else 0) + (entry.shape != "optimizer")  # the base's momentum
    in_batch = problem.BATCH_SIZE * 11 if "a batch" in entry.state else 0
    in_table = 2 * 64 if "per example" in entry.state else 0
    in_table = 2 * 64 * 3 if "logits of every example" in entry.state else in_table
    in_pairs = 2 * (10 + 16 + 16 + 3) if "low rank" in entry.state else 0
    assert abs(sum(floating) - copies * size - in_batch - in_table - in_pairs) < 0.2 * size
    has_mask = any(x.dtype == bool and x.size > 1 for x in jax.tree.leaves(state))
    assert has_mask == ("a byte per parameter" in entry.state)


def test_search():
    def names(pattern):
        return [entry.name for entry in samx.catalog(pattern)]

    assert names("look*") == ["looksam", "look_layer_sam", "lookbehind_sam"]
    assert names("LOOK*") == names("look*")
    assert names("sam") == ["sam"]
    assert names("asam") == ["asam"]
    assert "adasam" in names("*asam")
    assert names("lightsam") == ["lightsam_norm", "lightsam_adagrad", "lightsam_adam"]
    assert names("Focal-SAM") == ["focal_sam"]
    assert names("long-tailed") == ["focal_sam"]
    assert names("look-layer-sam") == names(" Look_Layer SAM ") == ["look_layer_sam"]
    assert names("mup2") == ["mup_sam"]
    assert names("2203.02714") == ["looksam", "look_layer_sam", "periodic"]
    assert names("liu2022looksam") == names("2203.02714")
    assert names("no such thing") == []
    assert names("*") == names("") == NAMES


def test_what_is_no_pattern():
    with pytest.raises(TypeError, match="`pattern` must be a string, got int"):
        samx.catalog(3)


def test_it_prints_as_a_table():
    lines = repr(samx.catalog("look*")).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "looksam",
        "look_layer_sam",
        "lookbehind_sam",
    ]
    assert len(repr(ENTRIES).splitlines()) == 2 + len(ENTRIES)
    assert repr(samx.catalog("no such thing")).startswith("name")


def test_a_single_row_prints_as_its_card():
    assert repr(samx.catalog("looksam")) == samx.catalog("looksam")[0].card()


@every_entry
def test_the_card_is_complete(entry):
    card = CARDS[entry.name]
    texts = (card.use_when, card.not_when, card.watch)
    assert all(text.endswith(".") and text.count(". ") <= 2 for text in texts)
    assert card.start
    for start in card.start:
        assert start.source or start.kind in ("recalled", "default")
        if start.kind == "measured":
            assert (ROOT / start.source).is_file()
    text = entry.card()
    assert max(map(len, text.splitlines())) <= 100
    for part in (entry.method, entry.call, *entry.formula().splitlines(), "Start with rho:"):
        assert part in text
    plain = " ".join(text.split())
    for part in (*texts, *map(str, card.start)):
        assert " ".join(part.split()) in plain


@every_entry
def test_a_card_names_arguments_that_exist(entry):
    """What another code's arguments become is this factory's argument, or a sentence about it."""
    parameters = inspect.signature(entry.factory).parameters
    for arguments in CARDS[entry.name].coming_from.values():
        for ours in arguments.values():
            names = re.findall(r"^(\w+)(?:=|$)", ours)
            assert set(names) <= {*parameters, *samx.__all__}, ours
            called = re.match(r"(\w+)\(", ours)
            assert called is None or hasattr(samx, called[1]), ours


def test_every_entry_has_a_card_and_a_family():
    families = [name for names in FAMILIES.values() for name in names]
    assert sorted(families) == sorted(CARDS) == sorted(NAMES)


@every_entry
def test_the_formula_is_the_rule(entry):
    formula = entry.formula()
    assert "=" in formula or "return" in formula
    assert "Args:" not in formula
    assert max(map(len, formula.splitlines())) <= 96


@every_entry
def test_bibtex(entry):
    text = entry.bibtex()
    kind = "misc" if not entry.venue else "(inproceedings|article)"
    assert re.match(rf"@{kind}{{{entry.key},\n", text)
    assert text.isascii()
    assert text.count("{") == text.count("}")
    fields = re.findall(r"^  (\w+) = {(.*)},$", text, re.MULTILINE)
    assert len(fields) == text.count("\n") - 1
    assert {"title", "author", "year", "eprint", "url"} <= dict(fields).keys()
    surnames = [name.split(",")[0] for name in entry.authors.split(" and ")]
    if entry.name not in MADE_OF_OTHERS:  # the docstring of the file names the same people
        people = (inspect.getmodule(entry.factory).__doc__ or "").replace("\n", " ")
        assert f"{', '.join(surnames)}. " in people


def test_bibtex_of_several_rows_has_each_paper_once():
    text = samx.catalog().bibtex()
    assert text.count("\n@") + 1 == len({entry.key for entry in ENTRIES})


def test_the_papers_are_those_of_the_files():
    """The docstring of each file also has the title and the number of the paper."""
    for entry in ENTRIES:
        if entry.name in MADE_OF_OTHERS:
            continue
        doc = " ".join((inspect.getmodule(entry.factory).__doc__ or "").split())
        assert entry.arxiv in doc, entry.name
        assert entry.paper in doc, entry.name
