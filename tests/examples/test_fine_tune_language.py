"""The language of fine_tune.py: English and code, what is trained, what is rounded, every row."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.common import fine_tuning
from examples.common.gpt import Size
from examples.common.language_task import make_task
from examples.common.rounding import rounded
from examples.train import fine_tune, fine_tune_language, prose, text

MODULE = '''"""A docstring that is long enough to be taken as English."""
# A comment in two lines, which are
# one text, because nothing is between them.
import os  # short

def f(x):
    """Another docstring that is long enough to be taken."""
    return "a string"  # a comment at the end of a line, long enough


class Empty:
    """A class that has nothing but this long docstring."""
'''
ENGLISH = {
    "A docstring that is long enough to be taken as English.",
    "A comment in two lines, which are\none text, because nothing is between them.",
    "a comment at the end of a line, long enough",
    "Another docstring that is long enough to be taken.",
    "A class that has nothing but this long docstring.",
}
CODE = 'import os\n\ndef f(x):\n    return "a string"\n\nclass Empty:\n    pass\n'


def test_a_module_is_split_into_english_and_code():
    found = [*prose.of_file("a.py", MODULE)]
    assert {piece for kind, _, piece in found if kind == "english"} == ENGLISH
    (code,) = (piece for kind, _, piece in found if kind == "code")
    assert code == ast.unparse(ast.parse(CODE))
    assert {held_out for _, held_out, _ in found} == {text.is_held_out("a.py")}
    topics = {"long": "words " * 100, "short": "words", "last": "more " * 100}
    found = [*prose.of_file(prose.MANUAL, f"topics = {topics}")]
    assert [(kind, piece) for kind, _, piece in found] == [
        ("english", topics["long"]),
        ("english", topics["last"]),
    ]
    assert [held_out for _, held_out, _ in found] == [True, False]


@pytest.fixture
def sources(tmp_path):
    """A folder in the form of a standard library."""
    for number in range(120):
        (tmp_path / f"m{number}.py").write_text(MODULE)
    return tmp_path


def test_every_file_is_in_one_part(sources):
    english, code = prose.load(sources)
    taken = [n for n in text.names_of(sources) if prose.is_taken(n)]
    assert 20 < len(taken) < 80
    held_out = sum(map(text.is_held_out, taken))
    assert bytes(code.held_out).count(b"import os") == held_out
    assert bytes(code.train).count(b"import os") == len(taken) - held_out
    assert b"docstring" not in bytes(code.train)
    assert b"import os" not in bytes(english.train)
    for path in sources.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="too few Python sources for English and code"):
        prose.load(sources)


def test_what_is_rounded():
    """Per output unit: a row of the embedding, a column of other matrices; not norms."""
    rng = np.random.default_rng(0)
    weights = {
        "embedding": {"embedding": rng.normal(size=(6, 4))},
        "blocks": {
            "down": {"kernel": rng.normal(size=(2, 5, 3))},
            "mlp_norm": {"scale": rng.normal(size=(2, 3))},
        },
        "head": rng.normal(size=(4, 6)),
    }
    weights = jax.tree.map(jnp.asarray, weights)
    found = fine_tune_language.deployed(weights, 3)
    embedding = found["embedding"]["embedding"]
    np.testing.assert_array_equal(embedding, rounded(weights["embedding"]["embedding"].T, 3).T)
    assert max(len(set(row)) for row in np.asarray(embedding).tolist()) <= 4
    np.testing.assert_array_equal(found["head"], rounded(weights["head"], 3))
    down = weights["blocks"]["down"]["kernel"]
    np.testing.assert_array_equal(found["blocks"]["down"]["kernel"], rounded(down, 3))
    scale = weights["blocks"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(found["blocks"]["mlp_norm"]["scale"], scale)


def test_a_new_adaptation_changes_no_weight():
    task = make_task(Size(4, 2, 8, 4), optax.identity(), devices=jax.devices()[:1])
    params = jax.tree.map(
        lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), task.state.params
    )
    for adapt, leaves in (("whole", 8), ("lora", 8), ("head", 1)):
        start, merge, fill = fine_tune_language.adapted(adapt, params, jax.random.key(0))
        weights = dict(fill(merge(start)))
        assert len(jax.tree.leaves(start)) == leaves
        if adapt == "head":
            head = weights.pop("head")
            np.testing.assert_array_equal(head, params["embedding"]["embedding"].T)
        jax.tree.map(np.testing.assert_array_equal, weights, params)


@pytest.mark.slow
def test_every_row(in_empty_folder, read_report, sources, monkeypatch):
    around = fine_tune.around
    monkeypatch.setattr(
        fine_tune, "around", lambda *of, **more: around(*of, **more)._replace(reach=0)
    )
    monkeypatch.setattr(fine_tune_language, "texts", lambda: prose.load(sources))
    settings = {"LENGTH": 8, "TRAIN": 16, "HELD_OUT": 8, "MEASURED": 4, "SEEDS": range(9, 10)}
    for name, value in settings.items():
        monkeypatch.setattr(fine_tune_language, name, value)
    arguments = "--task language --seeds 2 --steps 2 --pretraining 2 --width 8 --out results"
    results = fine_tune.main(arguments.split())
    assert [r["row"] for r in results] == [n for n in fine_tuning.ROWS if n != "lora logits-sam"]
    for result in results:
        row = fine_tuning.ROWS[result["row"]]
        assert np.mean(result["gradients"]) == pytest.approx(2 * row.times * row.gradients, rel=0.5)
        assert np.isfinite([result["rise"], result["top_eigenvalue"]]).all()
        assert len({*result["new_loss"]}) == 2
    before = read_report(in_empty_folder / "results")["before"]
    assert {"old_loss", "old_loss_3_bits", "top_eigenvalue", "rise"} <= {*before}
