"""Write what pages take from the package and from committed results.

These are the method cards, fidelity, the list of names, and the tables of results: of the digits
example, of the comparison, and of the memory of large models.

    python notebooks/_pages/write.py

A page holds hand-written text, and parts between the comments `<!-- begin NAME -->` and
`<!-- end NAME -->`. This script replaces these parts. `tests/docs/test_pages.py` fails where a page
holds something else.
"""

import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import samx
from examples import digits
from examples.claims import averages, late_sam
from examples.compare import (
    cells,
    comparison_figures,
    options,
    overparameterization,
    overparameterization_claims,
    overparameterization_report,
    sharpness_and_accuracy,
    tables,
)
from examples.train import fine_tune, preference
from notebooks._pages import claims
from samx.catalog.cards import CARDS, FAMILIES, Start
from samx.catalog.table import ENTRIES, SHAPES, Entry

FOLDER = Path(__file__).parents[1]
RESULTS = FOLDER.parent / "examples" / "compare" / "results"
DIGITS = RESULTS / "digits.json"
CLAIMS = FOLDER.parent / "examples" / "claims" / "results"
FINE_TUNED = ("images", "mnist", "language")
AVERAGES, LATE_SAM = CLAIMS / "averages.json", CLAIMS / "late_sam.json"
CELLS, SHARPNESS = options.RESULTS, RESULTS / "sharpness_and_accuracy.json"
ON_PAGE = ("method", "test", "gain", "at equal time", "step", "lr", "rho")  # columns of a task
HEADLINE, CLEAN = "digits-noisy", "digits-clean"  # the tasks of the README
SHOWN = ("base", "base2x", "sam", "asam", "looksam", "momentum-sam")  # in the README
BY_NAME = {entry.name: entry for entry in ENTRIES}

# The public names of `samx` itself, by kind. Variants come from the families of the cards.
KINDS = {
    "Finding a variant": ("catalog",),
    "The step": ("is_sharp_pass", "value_and_grad_at", "preflight"),
    "Sharp gradients on some steps": ("perturb_if",),
    "Around an optimizer": (
        *("accumulate", "all_readings", "freeze", "on_merged", "scale_loss", "skip_nonfinite"),
        "with_base",
    ),
    "Branches and loops": ("fast_convolutions",),
    "Several devices": ("data_parallel", "value_and_grad", "axis_mean", "state_specs"),
    "In a state": ("Readings", "HeldBatch"),
    "Writing a variant": ("closure_transformation",),
}
ROWS = ("catalog.Catalog", "catalog.Entry", "catalog.cards.Card", "catalog.cards.Start")
MODULES = (
    "perturbations",
    "policies",
    "combinations",
    "selection",
    "sharpness",
    "schedules",
    "losses",
    "mup",
    "posterior",
    "averages",
    "asynchronous",
    "elastic",
    "flax",
)


def pages() -> dict[str, dict[str, str]]:
    """Return the written parts of each page."""
    return {
        "methods.md": {"table": method_table(), "cards": method_cards()},
        "fidelity.md": fidelity_tables(),
        "api.md": {"names": name_lists(), "reference": reference()},
        "results.md": {
            "digits": digits_table(),
            "averages": averages_table(),
            "late_sam": late_sam_table(),
        },
        "comparison.md": comparison_parts(),
        "claims.md": claims.parts(),
        "memory.md": memory_tables(),
        "overparameterization.md": overparameterization_tables(),
        "fine_tuning.md": {
            **{name: fine_tune_table(name) for name in FINE_TUNED},
            "preference": preference_table(),
        },
        "../README.md": readme_parts(),
    }


def fill(text: str, parts: dict[str, str]) -> str:
    """Return a page's text with its parts replaced."""
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"no part between {begin.strip()} and {end}")
        text = f"{before}{begin}\n{part}\n\n{end}{after}"
    return text


def in_order() -> list[Entry]:
    """Return the entries in the order of the families."""
    return [BY_NAME[name] for names in FAMILIES.values() for name in names]


# Results of examples/digits.py


def digits_table(*names: str) -> str:
    """Return accuracies and paired leads over the better of both baselines, in percent.

    Args:
        names: The rows to show; all if there is none.
    """
    results: dict[float, list[dict[str, Any]]] = {}
    for row in json.loads(DIGITS.read_text())["rows"]:
        results.setdefault(row["noise"], []).append(row)
    bases = {noise: digits.better_baseline(rows) for noise, rows in results.items()}
    head = ["method"]
    for noise, base in bases.items():
        labels = f"{noise:.0%} wrong labels" if noise else "clean labels"
        head += [f"test accuracy, %, {labels}", f"minus {base}"]
    lines = [[*head, "gradients"], ["---"] * (len(head) + 1)]
    for name in names or [row["row"] for row in results[0.0]]:
        cells, spent = [name], []
        for noise, rows in results.items():
            [row] = [row for row in rows if row["row"] == name]
            accuracy = digits.with_error(row["mean"], row["error"], sign="")
            cells.append(accuracy + "*" * bool(row["edges"]))
            is_base = name == bases[noise]
            cells.append(
                "" if is_base else digits.with_error(*digits.lead_of(rows, name, bases[noise]))
            )
            spent.append(f"{row['gradients']:.0f}")
        lines.append([*cells, ", ".join(dict.fromkeys(spent))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Results of examples/compare

NOT_YET = "There are no committed results yet."


@functools.cache
def compared() -> dict[str, dict[str, cells.Cell]]:
    """Return the committed cells by task and row; none before the first run."""
    return cells.read_cells(CELLS) if any(CELLS.glob("*/*.json")) else {}


def comparison_parts() -> dict[str, str]:
    """Return the parts of the page of the comparison."""
    tasks = "\n\n".join(comparison_table(task) for task in compared())
    return {
        "gains": picture("comparison.png", "One panel for each task: gain over training time."),
        "ranking": ranking_table(),
        "sharpness": sharpness_table(),
        "tasks": tasks or NOT_YET,
        "notes": "\n".join(f"- {line}" for line in tables.notes_of(compared()))
        if compared()
        else NOT_YET,
    }


def readme_parts() -> dict[str, str]:
    """Return the parts of the README: headline and table, from the comparison when it is there."""
    if not {HEADLINE, CLEAN} <= compared().keys():
        return {"digits": digits_table(*SHOWN)}
    found = {
        task: {each.row: each for each in tables.summarize(compared()[task])}
        for task in (HEADLINE, CLEAN)
    }
    return {"digits": f"{headline(found)}\n\n{headline_table(found)}"}


def headline(found: dict[str, dict[str, tables.Summary]]) -> str:
    """State what SAM and the best method gain, with wrong labels and with clean ones."""
    noisy, clean = found.values()
    methods = [each for row, each in noisy.items() if row not in digits.BASELINES]
    best = max(methods, key=lambda each: each.gain.value)
    gain = tables.shown(noisy["sam"].gain, 2)
    others = "" if best.row == "sam" else f", {best.row} {tables.shown(best.gain, 2)}"
    ahead = sum(each.gain.is_above for each in methods)
    return (
        f"Digits, 30% of the labels wrong, at equal gradients: SAM is {gain} points ahead of the "
        f"better baseline{others}; {ahead} of {len(methods)} methods are ahead by their "
        f"whole 95% interval. With clean labels SAM gains {tables.shown(clean['sam'].gain, 2)}. "
        "`base2x` has twice the steps, so SAM's gradients. Equal tuning; "
        f"{noisy['sam'].cell.seeds} paired seeds."
    )


def headline_table(found: dict[str, dict[str, tables.Summary]]) -> str:
    """Return the table of the README: results and gains of some methods in both tasks."""
    head, lines = ["method"], {name: [name] for name in SHOWN}
    for task, labels in ((HEADLINE, "30% wrong labels"), (CLEAN, "clean labels")):
        _, gain, digits_shown = tables.head_of(compared()[task])
        head += [f"test accuracy, %, {labels}", gain]
        for name, line in lines.items():
            each = found[task][name]
            line += [tables.shown(each.result, digits_shown), tables.shown(each.gain, 2, "+")]
    for name, line in lines.items():
        line.append(f"{found[HEADLINE][name].cell.gradients_per_step:.3g}")
    return table_of([*head, "gradients per step"], [*lines.values()])


def picture(name: str, text: str) -> str:
    """Return the Markdown of a committed figure; nothing before there is one."""
    return f"![{text}]({name})" if (FOLDER / name).exists() else NOT_YET


def comparison_table(task: str) -> str:
    """Return the table of a task, with a heading, and what it comes to."""
    mine = compared()[task]
    summaries = tables.summarize(mine)
    head, *rows = tables.result_grid(mine, summaries)
    places = [place for place, name in enumerate(head) if name.startswith(ON_PAGE)]
    head, *rows = [[line[place] for place in places] for line in (head, *rows)]
    title = f"### {comparison_figures.title_of(task)}"
    verdict = f"`{task}`, {mine['base'].seeds} seeds: {tables.verdict(mine, summaries)}."
    return "\n\n".join([title, verdict, table_of(head, rows)])


def ranking_table() -> str:
    """Return the average ranks of all methods, one table for each group of tiers."""
    parts = [picture("ranking.png", "Average rank of each method, with its interval.")]
    for found in tables.rankings_of(compared()):
        head, *rows = tables.ranking_grid(found)
        rows = [[method_name(name), *others] for name, *others in rows]
        parts += [f"**{found.title}**", table_of(head, rows)]
    return "\n\n".join(parts) if compared() else NOT_YET


def sharpness_table() -> str:
    """Return how measures of sharpness and the test score are correlated, and what that says."""
    if not SHARPNESS.exists():
        return NOT_YET
    summary = sharpness_and_accuracy.summary_of(json.loads(SHARPNESS.read_text()))
    parts = [picture("sharpness_and_accuracy.png", "Correlation of each measure in each task.")]
    for level in sharpness_and_accuracy.LEVELS:
        columns = sharpness_and_accuracy.columns_of(level)
        head, *rows = sharpness_and_accuracy.grid_of(summary, columns)
        parts.append(table_of(head, rows))
    told = (f"- {line}" for line in sharpness_and_accuracy.sentences_of(summary))
    return "\n\n".join([*parts, "\n".join(told)])


# Results of examples/claims/averages.py and late_sam.py


def averages_table() -> str:
    """Return accuracies, and paired leads over SGD and over the same optimizer, in percent."""
    return accuracies_table(
        AVERAGES,
        ("method, learning rate", "minus sgd", "minus its optimizer"),
        averages.name_of,
        averages.leads_of,
    )


def late_sam_table() -> str:
    """Return accuracies, and paired leads over SGD and over SAM, in percent."""
    return accuracies_table(
        LATE_SAM,
        ("SAM", "minus sgd", "minus sam"),
        lambda row: f"{row['row']}, {row['steps']} steps",
        late_sam.leads_of,
    )


# Results of examples/compare/overparameterization.py


def overparameterization_tables() -> dict[str, str]:
    """Return how much is trained, SAM's gain for each network, and the claims."""
    results = overparameterization.read_all(overparameterization.parse([]))
    grids = {
        "gains": overparameterization_report.gains_table(results),
        "claims": overparameterization_claims.claims_table(
            overparameterization_claims.claims_of(results)
        ),
    }
    tables = {name: table_of(head, rows) for name, (head, *rows) in grids.items()}
    return {"progress": overparameterization.progress_of(results), **tables}


# Results of examples/train/fine_tune.py


def fine_tune_table(task: str) -> str:
    """Return what is learned and forgotten, the loss in 3 bits, and sharpness."""
    rows = json.loads((CLAIMS / f"fine_tune_{task}.json").read_text())["rows"]
    kind = "accuracy" if "new_accuracy" in rows[0] else "loss"
    unit, names = ", %" * (kind == "accuracy"), (f"new_{kind}", f"forgotten_{kind}")
    head = [f"new {kind}{unit}", "minus AdamW", f"forgotten{unit}", "minus AdamW"]
    head += ["new loss in 3 bits", "minus AdamW", "top eigenvalue", "gradients", "rho"]
    lines = [["method", *head], ["---"] * (len(head) + 1)]
    for row in rows:
        cells = [row["row"]]
        for name in (*names, "new_loss_3_bits"):
            lead = row["differences"].get(name)
            cells.append(fine_tune.shown(name, *row[name]))
            cells.append(fine_tune.shown(name, *lead, "+") if lead else "")
        cells += [
            f"{row['top_eigenvalue'][0]:.3g}",
            f"{row['gradients'][0]:.0f}",
            f"{row['rho']:g}",
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def preference_table() -> str:
    """Return what preference tuning gives, and what a step costs."""
    results = json.loads((CLAIMS / "preference.json").read_text())["results"]
    head, *rows = preference.table(results)
    return table_of(head, rows)


def accuracies_table(
    path: Path,
    heads: tuple[str, str, str],
    name_of: Callable[[dict[str, Any]], str],
    leads_of: Callable[[dict[str, Any], list[dict[str, Any]]], list[str]],
) -> str:
    """Return the accuracies of committed results, each with two paired leads, in percent."""
    rows = json.loads(path.read_text())["results"]
    found: dict[str, list[str]] = {}
    head = [heads[0]]
    for noise in dict.fromkeys(row["noise"] for row in rows):
        labels = f"{noise:.0%} wrong labels" if noise else "clean labels"
        head += [f"test accuracy, %, {labels}", *heads[1:]]
        mine = [row for row in rows if row["noise"] == noise]
        for row in mine:
            accuracy = averages.shown(*averages.mean_and_error(row["accuracy"]))
            found.setdefault(name_of(row), []).extend([accuracy, *leads_of(row, mine)])
    return table_of(head, [[name, *cells] for name, cells in found.items()])


# Results of examples/train/language_model.py --abstract

Place = tuple[str, bool, int]  # size, remat, devices
PLACES: tuple[Place, ...] = tuple(
    (size, True, n) for size, n in (("100M", 1), ("1B", 8), ("7B", 8), ("7B", 64))
)
ONE_SIZE = ("1B", True, 8)


def memory_tables() -> dict[str, str]:
    """Return the tables of kinds of variants, with and without remat, and of every variant."""
    kinds, every = (
        json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        for name in ("memory", "memory_of_every_variant")
    )
    at: dict[Place, dict[str, dict[str, Any]]] = {}
    for row in [*every, *kinds]:
        at.setdefault((row["size"], row["remat"], row["devices"]), {})[row["method"]] = row
    methods = list(dict.fromkeys(row["method"] for row in kinds))
    largest = at[PLACES[-1]]
    return {
        "kinds": table_of(
            ["method", "state", *map(place_name, PLACES), "flops", "sent"],
            [
                [
                    method_name(name),
                    f"{at[ONE_SIZE][name]['copies']:.2f} P",
                    *(peak(at[place][name]) for place in PLACES),
                    *(times_adamw(largest[name], kind) for kind in ("flops", "sent")),
                ]
                for name in methods
            ],
        ),
        "remat": table_of(
            ["method", *(f"{size}, {n} devices" for size, _, n in PLACES[1:3])],
            [
                [method_name(name), *(peak(at[size, False, n][name]) for size, _, n in PLACES[1:3])]
                for name in methods
            ],
        ),
        "every": table_of(
            ["method", "state", "temporary, GB", "peak / AdamW's", "flops", "sent"],
            [
                every_cells(row)
                for row in sorted(
                    at[ONE_SIZE].values(), key=lambda row: row.get("peak_bytes", float("inf"))
                )
            ],
        ),
        "adapters": adapters_table(),
    }


ADAPTED = {  # the rows of the table of adapters: what is trained, and how
    ("whole", "adamw"): "the whole model, FSDP: adamw",
    ("whole", "sam"): "sam",
    ("whole", "logits-sam"): "logits_sam",
    ("lora", "adamw"): "adapters, FSDP: adamw",
    ("lora", "sam"): "sam on the adapters",
    ("lora", "sam in a branch"): "the same in a branch",
    ("lora-data", "adamw"): "adapters, all weights on every device: adamw",
    ("lora-data", "sam"): "sam on the adapters",
    ("lora-data", "sam in a branch"): "the same in a branch",
}


def adapters_table() -> str:
    """Return the table of adapters and logits-SAM, with remat: 1B on 1 and on 8 devices."""
    rows = json.loads((RESULTS / "memory_of_adapters.json").read_text())["rows"]
    at = {(r["adapt"], r["method"], r["devices"]): r for r in rows if r["remat"]}
    lines = []
    for (adapt, method), name in ADAPTED.items():
        one, eight = at[adapt, method, 1], at[adapt, method, 8]
        plain = at[adapt, "adamw", 8]
        gathered, reduced = (
            f"{eight['sent'].get(kind, 0) / 1e9:.2f}" for kind in ("all-gather", "all-reduce")
        )
        lines.append(
            [
                name,
                *(held_and_more(row) for row in (one, eight)),
                f"{eight['flops'] / plain['flops']:.2f}",
                gathered,
                reduced,
            ]
        )
    head = ["trained, method", "1 device, GB", "8 devices, GB", "flops", "gathered", "summed"]
    return table_of(head, lines)


def held_and_more(row: dict[str, Any]) -> str:
    """Return what a device holds and what a step needs beside it, in GB."""
    return f"{row['state_bytes'] / 1e9:.2f} + {row['temporary_bytes'] / 1e9:.2f}"


def every_cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table of every method."""
    if "refused" in row:
        return [method_name(row["method"]), *["refused"] * 5]
    return [
        method_name(row["method"]),
        f"{row['copies']:.2f} P",
        f"{row['temporary_bytes'] / 1e9:.2f}",
        *(f"{row[f'{kind}_to_adamw']:.2f}" for kind in ("peak", "flops", "sent")),
    ]


def place_name(place: Place) -> str:
    size, _, n = place
    return f"{size}, {n} device{'s' * (n > 1)}"


def times_adamw(row: dict[str, Any], kind: str) -> str:
    return "refused" if "refused" in row else f"{row[f'{kind}_to_adamw']:.2f}"


def peak(row: dict[str, Any]) -> str:
    """Return a peak in GB, and in brackets relative to AdamW's."""
    if "refused" in row:
        return "refused"
    return f"{row['peak_bytes'] / 1e9:.1f} ({row['peak_to_adamw']:.2f})"


def method_name(name: str) -> str:
    """Return the name of a row, with a link to the card if there is one."""
    card = name.replace("-", "_")
    return f"[{name}](methods.md#{card})" if card in BY_NAME else name


def table_of(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


# Method cards


def method_table() -> str:
    """Return the table of all variants: few columns, so that a phone shows it whole."""
    lines = ["| variant | paper | gradients per step |", "|---|---|---|"]
    for family, names in FAMILIES.items():
        lines.append(f"| **{family}** | | |")
        for name in names:
            entry = BY_NAME[name]
            paper = f"{entry.method}, {entry.published}"
            lines.append(f"| [{name}](#{name}) | {paper} | {entry.gradients} |")
    return "\n".join(lines)


def method_cards() -> str:
    """Return a card for each variant, under the headings of their families."""
    found = claims.claims_of_systems()

    def card(name: str) -> str:
        return method_card(BY_NAME[name], claims.on_card(found.get(name, [])))

    return "\n\n".join(
        "\n\n".join([f"## {family}", *map(card, names)]) for family, names in FAMILIES.items()
    )


def method_card(entry: Entry, claimed: list[str]) -> str:
    """Return the card of a variant, with the items about the paper's claims."""
    card = CARDS[entry.name]
    closures = ", ".join(f"`{name}`" for name in entry.closures)
    people = ", ".join(name.split(",")[0] for name in entry.authors.split(" and "))
    items = [
        f"**Use when:** {card.use_when}",
        f"**Not when:** {card.not_when}",
        f"**Cost:** gradients per step: {entry.gradients}; held in the state: {entry.state}.",
        f"**Needs:** {closures} in `update`; {SHAPES[entry.shape]}.",
        "**Start with rho:**",
        *(f"  {start_value(start)}" for start in card.start),
        f"**Watch:** {card.watch}",
        f"**Fidelity:** {sentence(entry.fidelity)} {entry.doubts()}".rstrip(),
        *claimed,
    ]
    for code, arguments in card.coming_from.items():
        pairs = "; ".join(f"`{theirs}` → {argument(ours)}" for theirs, ours in arguments.items())
        items.append(f"**Coming from {code}:** {pairs}.")
    factory = entry.factory.__name__
    shown = ", ".join(
        f"[{Path(path).name.removesuffix('.ipynb')}]({link(path)})" for path in card.shown_in
    )
    more = f"{{py:obj}}`samx.{factory}`" + (f"; shown in {shown}" if shown else "")
    items.append(f"**More:** {more}.")
    lines = [f"{item[: len(item) - len(item.lstrip())]}- {item.lstrip()}" for item in items]
    return "\n".join([
        f"### {entry.name}",
        "",
        f"**{entry.method}.** {people}: [{entry.paper}]({entry.url}), {entry.published}.",
        "",
        "```python",
        f"tx = {build(entry)}",
        "```",
        "",
        "```text",
        entry.formula(),
        "```",
        "",
        *lines,
        "",
        "```bibtex",
        entry.bibtex(),
        "```",
    ])  # fmt: skip


def build(entry: Entry) -> str:
    """Return the line that builds the optimizer, with the base where it stands."""
    public = "|".join(name for name in samx.__all__ if name in entry.call)
    call = re.sub(rf"(?<![\w.])({public})(?=[(.])", r"samx.\1", entry.call)
    return f"optax.chain({call}, base)" if entry.shape == "chain" else call


def start_value(start: Start) -> str:
    """Return a value of rho as a list item, with where it comes from."""
    source = start.source
    if (FOLDER.parent / source).is_file():
        source = f"[{Path(source).name}]({link(source)})"
    kind = f"*{start.kind}*: {source}" if source else f"*{start.kind}*"
    return f"**{start.rho}** for {start.where} ({kind})"


def sentence(text: str) -> str:
    """Return the text as a sentence, with a capital letter and a full stop."""
    first = next(i for i, letter in enumerate(text) if letter.isalpha() or letter == "`")
    text = f"{text[:first]}{text[first].upper()}{text[first + 1 :]}".removesuffix(".") + "."
    return re.sub(r"(\de)-(\d)", "\\1\N{NON-BREAKING HYPHEN}\\2", text)  # 1e-15 on one line


def argument(ours: str) -> str:
    """Return what another code's argument is called here: code, or words."""
    is_code = "`" not in ours and ("(" in ours or "=" in ours)
    return f"`{ours}`" if is_code or re.fullmatch(r"[\w.]+(, [\w.]+)*", ours) else ours


def link(path: str) -> str:
    """Return the address of a file of the repository as seen from a page."""
    return path.removeprefix("notebooks/") if path.startswith("notebooks/") else f"../{path}"


# Fidelity


def fidelity_tables() -> dict[str, str]:
    """Return a table for each kind of evidence."""
    return {
        evidence: fidelity_table(entry for entry in in_order() if entry.evidence == evidence)
        for evidence in ("authors", "others", "reconstructed")
    }


def fidelity_table(entries: Iterable[Entry]) -> str:
    """Return what was compared with whose code, and how far apart they are."""
    lines = ["| variant | compared with |", "|---|---|"]
    lines += [
        f"| [{entry.name}](methods.md#{entry.name}) | {sentence(entry.fidelity)} |"
        for entry in entries
    ]
    return "\n".join(lines)


# API reference


def modules() -> dict[str, Any]:
    """Return the public modules by name."""
    return {name: importlib.import_module(f"samx.{name}") for name in MODULES}


def names_by_kind() -> dict[str, list[str]]:
    """Return the public names of `samx` that are no modules, by kind."""
    variants = [name for names in FAMILIES.values() for name in names if name in samx.__all__]
    return {"Variants": variants, **{kind: list(names) for kind, names in KINDS.items()}}


def summary(value: Any) -> str:
    """Return the first line of a docstring, for Markdown."""
    first = (inspect.getdoc(value) or "").splitlines()[0]
    return re.sub(r"(?<!`)\|(?!`)", r"\\|", first)


def name_lists() -> str:
    """Return one line for each public name, with its anchor."""
    blocks = []
    for kind, names in names_by_kind().items():
        blocks += [f"**{kind}**", name_list("samx", names, lambda name: getattr(samx, name))]
    for title, module in modules().items():
        names = module.__all__
        blocks += [
            f"**samx.{title}**: {summary(module)}",
            name_list(f"samx.{title}", names, lambda name, module=module: getattr(module, name)),
        ]
    return "\n\n".join(blocks)


def name_list(prefix: str, names: Iterable[str], find: Callable[[str], Any]) -> str:
    """Return the list of names with their first lines."""
    return "\n".join(f"- {{py:obj}}`{prefix}.{name}`: {summary(find(name))}" for name in names)


def reference() -> str:
    """Return the directives that take the docstrings, one for each public name."""
    blocks = []
    for kind, names in names_by_kind().items():
        directives = [
            f".. autoclass:: samx.{name}\n   :members:"
            if inspect.isclass(getattr(samx, name))
            else f".. autofunction:: samx.{name}"
            for name in names
        ]
        blocks += [f"## {kind}", eval_rst("\n\n".join(directives))]
    directives = [f".. autoclass:: samx.{name}\n   :members:" for name in ROWS]
    blocks += ["## What samx.catalog returns", eval_rst("\n\n".join(directives))]
    for title in MODULES:
        directive = f".. automodule:: samx.{title}\n   :members:"
        blocks += [f"## samx.{title}", eval_rst(directive)]
    return "\n\n".join(blocks)


def eval_rst(text: str) -> str:
    """Return reStructuredText for MyST."""
    return f"```{{eval-rst}}\n{text}\n```"


def main() -> None:
    """Replace the written parts of all pages."""
    for name, parts in pages().items():
        path = FOLDER / name
        path.write_text(fill(path.read_text(), parts))


if __name__ == "__main__":
    main()
