"""Every notebook matches its text, keeps its outputs, and a smaller form of it runs.

Edit the text (`.py`). Then `python tests/docs/test_notebooks.py NAME ...` writes
the notebooks again.
"""

import io
import sys
from pathlib import Path

import jax
import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[2] / "notebooks"
SECONDS = 300
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TEXTS = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "conf.py"})
# The default run executes a smaller form: the text on the left, which occurs once, becomes that on
# the right. Building the book executes the notebooks as they are.
SMALLER = {
    "coming_from": {"STEPS, BATCH = 12, 16\n": "STEPS, BATCH = 3, 16\n"},
    "write_your_variant": {
        "\nSTEPS = 12\n": "\nSTEPS = 2\n",
        '    "multiplies by F",\n    "another norm",\n    "frozen radius",\n': "",
        '    "inside LookSAM": optax': '}\nunused = {\n    "inside LookSAM": optax',
        "NOISE, EPOCHS, SEEDS, TUNING_SEEDS = 64, 0.3, 40, range(12), tuning.TUNING_SEEDS": (
            "NOISE, EPOCHS, SEEDS, TUNING_SEEDS = 8, 0.3, 1, range(3), range(1)"
        ),
        '    "ASAM": (in_front(samx.asam), 2, EPOCHS, (0.25, 0.5, 1.0)),\n': "",
        "CHECKS = checks.CHECKS\n": "CHECKS = checks.CHECKS[:1]\n",
    },
    "sam_in_five_minutes": {
        "BATCH, SEEDS = 1000, 500, 100, 10\n": "BATCH, SEEDS = 1000, 500, 100, 2\n",
        "EPOCHS = 40\n": "EPOCHS = 2\n",
        "jnp.linspace(-2, 2, 41), jnp.linspace(-1, 2, 31)": "jnp.zeros(3), jnp.linspace(-1, 2, 3)",
        "jnp.array([-0.5, 0.8]), 2000)": "jnp.array([-0.5, 0.8]), 200)",
        "descend(tx, w, 600)": "descend(tx, w, 20)",
        # One program instead of one for each operation, and figures of numpy arrays.
        "jax.vmap(jax.grad(surface))(sam_path)": "jax.jit(jax.vmap(jax.grad(surface)))(sam_path)",
        "jax.vmap(surface)(section)": "jax.jit(jax.vmap(surface))(section)",
        "jax.vmap(worst, (0, None))": "jax.jit(jax.vmap(worst, (0, None)))",
        "    FAST: sgd_twice(SAM_RATE, 0.3),\n}\n": "}\n"
        "runs[FAST] = runs[TWICE]\nruns = jax.device_get(runs)\n",
        "landscape(jax.tree.map(lambda leaf: leaf[0], params))": (
            "jax.device_get(landscape(jax.tree.map(lambda leaf: leaf[0], params)))"
        ),
        "jnp.linspace(-0.5, 0.5, 41), jnp.linspace(0, 1, 21)": (
            "jnp.linspace(-0.5, 0.5, 5), jnp.linspace(0, 1, 5)"
        ),
        "figures.use_style()\n": "figures.use_style()\n"
        "plt.rcParams['figure.constrained_layout.use'] = False\n",
        "jax.random.split(jax.random.key(3), 10)": "jax.random.split(jax.random.key(3), 2)",
    },
    "measuring_sharpness": {
        "EPOCHS, WIDTH, RHO, BATCH = 40, 32, 0.2": "EPOCHS, WIDTH, RHO, BATCH = 1, 4, 0.2",
        '"hessian": "Hessian", "ggn": "Gauss-Newton", "empirical_fisher": "empirical Fisher"}': (
            '"ggn": "G"}'
        ),
        "grid = jnp.linspace(-2, 14, 800)": "grid = jnp.linspace(-2, 14, 5)",
        "sigma=0.3, iterations=60": "sigma=0.3, iterations=3, draws=2",
        "jnp.array([0.05, 0.1, 0.2, 0.4, 0.8])": "jnp.array([0.1, 0.2])",
        "metric_ball(rho)\n": "metric_ball(rho)\n        return dict.fromkeys(STYLES, rho)\n",
        '    "L2, ρ = 0.2": metric_ball(0.2),\n': "",
        '    "adaptive L2, ρ = 0.2": metric_ball(0.2, everywhere),\n': "",
        "SIZES = (1, 4, 20, 100, 1000)": "SIZES = (500, 1000)",
        "alphas = jnp.linspace(-1, 1, 41)": "alphas = jnp.linspace(-1, 1, 3)",
        "POINTS = 41": "POINTS = 3",
        "EDGE_STEPS, EVERY = 0.2, 0.05, 1500, 50": "EDGE_STEPS, EVERY = 0.2, 0.05, 100, 50",
        '    "gradient descent": (optax.sgd(EDGE_RATE), 0.0, RED),\n': "",
    },
    "training_loops": {
        "STEPS, BATCH, WIDTH, RHO, LEARNING_RATE = 150, 100, 64": (
            "STEPS, BATCH, WIDTH, RHO, LEARNING_RATE = 4, 8, 16"
        ),
        "LARGE, PARTS, LARGE_STEPS = 800, 8, 60": "LARGE, PARTS, LARGE_STEPS = 8, 2, 2",
        "FIRST, LAST = 20, 40": "FIRST, LAST = 1, 2",
        "dtype=jnp.float16": "dtype=jnp.bfloat16",  # some processors have no float16
        'for masks in ("same", "fresh"):': 'for masks in ("fresh",):',
    },
    "eight_devices": {
        "STEPS, BATCH, WIDTH, RHO, LEARNING_RATE = 100": (
            "STEPS, BATCH, WIDTH, RHO, LEARNING_RATE = 3"
        ),
        "SEEDS, EPOCHS, NOISE = 8, 20": "SEEDS, EPOCHS, NOISE = 2, 1",
        "jnp.array([0.05, 0.1, 0.2, 0.3, 0.4])": "jnp.array([0.1])",
        "for num_devices in (1, 2, 8):": "for num_devices in (1, 8):",
        "PAIR_STEPS = 20": "PAIR_STEPS = 2",
        '{"SAM": with_sam, "SAMPa": with_sampa}': '{"SAMPa": with_sampa}',
    },
    "workers_that_do_not_wait": {
        "SEEDS, EPOCHS, GRADIENTS, REPEATS = 10, 40, 3200, 5": (
            "SEEDS, EPOCHS, GRADIENTS, REPEATS = 2, 1, 64, 1"
        ),
        "batch_size=64, length=1000": "batch_size=64, length=2",
        '    "async-sam, b/4": (0.1, 0.2),\n': "",
        "EXCHANGES, SLOW, LIFE = 200, 0.02, 40": "EXCHANGES, SLOW, LIFE = 16, 0.0, 4",
        '    "easgd": (0.03, 0.0),\n    "sam, one worker": (0.03, 0.5),\n': "",
    },
    "choosing_rho": {
        "EPOCHS, WIDTH, TEST_SEEDS = 40, 64, 10\n": "EPOCHS, WIDTH, TEST_SEEDS = 2, 4, 2\n",
        '"SGD": (0.02, 0.05, 0.1, 0.2, 0.5), "AdamW": (1e-3, 2e-3, 5e-3, 0.01, 0.02)': (
            '"SGD": (0.1, 0.2), "AdamW": (2e-3, 5e-3)'
        ),
        '"SAM": (0, 0.1, 0.2, 0.4, 0.8), "ASAM": (0, 0.25, 0.5, 1, 2)': (
            '"SAM": (0, 0.2), "ASAM": (0, 1)'
        ),
        # One map, one variant with other units, and one schedule are enough.
        "pool.map(draw_map, *zip(*pairs, strict=True))": "[draw_map(*pairs[0])] * len(pairs)",
        "in same_rho.items():\n": "in list(same_rho.items())[1:2]:\n",
        '    "warm-up": samx.sam(warmup),\n    "first half only": between(0, half),\n': "",
    },
    "which_variant": {
        "NOISE, SEEDS, EPOCHS = 0.3, 10, 40\n": "NOISE, SEEDS, EPOCHS = 0.3, 2, 1\n",
        "TIMED_WIDTH, ROUNDS = 512, 9\n": "TIMED_WIDTH, ROUNDS = 64, 1\n",
        "steppers = {row: stepper(row) for row in timed}\n": (
            "steppers = dict.fromkeys(timed, stepper(timed[0]))\n"
        ),
        'in (rival, "momentum-sam", "looksam", "sam")': 'in (rival, "sam")',
        'live[f"sam, rate {neighbour}"] = run_row("sam", learning_rate=neighbour)\n': "",
    },
}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(notebook, folder):
    """Run all cells in a fresh kernel; raise if one fails."""
    client = NotebookClient(
        notebook,
        timeout=SECONDS,  # per cell
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(notebook):
    """Check that all cells ran in order and without errors, and that there is a figure."""
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [o for o in outputs if o.output_type == "error"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks():
    assert [path.stem for path in TEXTS] == [path.stem for path in NOTEBOOKS] != []


@every_notebook
def test_text_and_notebook_hold_the_same_cells(path):
    text, notebook = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(file).cells]
        for file in (path.with_suffix(".py"), path)
    )
    assert text == notebook


@every_notebook
def test_outputs_are_kept(path):
    notebook = nbformat.read(path, as_version=4)
    check_outputs(notebook)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []  # no warnings


def smaller(notebook, changes):
    """Change the text of a notebook, so that it computes less."""
    for old, new in changes.items():
        [cell] = [cell for cell in code_cells(notebook) if old in cell.source + "\n"]
        cell.source = (cell.source + "\n").replace(old, new)
    return notebook


# What they call is also called by tests of other rooms and of examples, and building the book
# executes all of them as they are. This one is the book's evidence.
FIRST = ("which_variant",)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in FIRST else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
)
def test_a_smaller_form_runs(path, monkeypatch):
    """In this process, where much of it is compiled already. A warning is an error."""
    notebook = smaller(jupytext.read(path.with_suffix(".py")), SMALLER[path.stem])
    drawn, namespace = [], {}

    def show():
        drawn.append(io.BytesIO())
        plt.savefig(drawn[-1])
        plt.close()

    monkeypatch.setattr(plt, "show", show)
    with matplotlib.rc_context(), jax.numpy_rank_promotion("allow"):
        plt.switch_backend("agg")
        for cell in code_cells(notebook):
            exec(compile(cell.source, path.stem, "exec"), namespace)
    figures = [cell for cell in code_cells(notebook) if "plt.show()" in cell.source]
    assert len(drawn) == len(figures) > 0
    assert min(len(figure.getvalue()) for figure in drawn) > 10_000


def test_a_failing_cell_turns_red(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("1 + 1", "raise ValueError('no')")]
    with pytest.raises(CellExecutionError) as caught:
        execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
    assert (caught.value.ename, caught.value.evalue) == ("ValueError", "no")


def write(path):
    """Execute the text and write the notebook, without times, versions or random cell ids."""
    notebook = execute(jupytext.read(path), FOLDER)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": kernel}
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index:02d}", {}
    check_outputs(notebook)
    nbformat.write(nbformat.from_dict(notebook), path.with_suffix(".ipynb"))


if __name__ == "__main__":
    names = sys.argv[1:]  # such as `choosing_rho`; without one, all
    for path in TEXTS:
        if path.stem in names or not names:
            write(path)
