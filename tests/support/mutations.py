"""Small mistakes in samx's modules, and the tests that must notice them.

A mutation changes one expression of one file. samx is imported anew with it, in this process. Rows
of the table that run through the changed line must fail one of `checks.py`, or a test of the file's
own suites must fail.
"""

import ast
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cases
import jax
import problem
import pytest
import recorded

import samx

PACKAGE = Path(samx.__file__).parent
FOLDERS = ("variants", "perturbations", "policies", "core", "selection", "averages")
FILES = [
    *(f for folder in FOLDERS for f in sorted((PACKAGE / folder).glob("*.py"))),
    PACKAGE / "combinations.py",
    PACKAGE / "losses.py",
]
SUPPORT = Path(__file__).parent
WITHOUT_SAMX = ("mutations", "problem", "reference")  # the other helpers are imported anew with it
MOST_ROWS = 8  # that are tried for one mutation
SECONDS = 120  # of computing, after which the rows' checks have failed
AVERAGES = ("mean", "_mean", "pmean", "mean_loss", "nanmean", "average")
ORDERED = ("where", "cond", "branch", "clip", "sub", "subtract", "divide", "minimum", "maximum")
BALLS = (
    "perturbations/test_geometry.py",
    "core/test_norms.py",
    "variants/test_formulation_loops.py::test_formulations",
)
MASKS = ("variants/test_sparse_sam.py",)
EXAMPLES = (
    "selection/test_selection.py::test_the_default",
    "selection/test_selection.py::test_readings",
    "selection/test_selection.py::test_defaults",
    "selection/test_selection.py::test_ausam",
    "selection/test_selection.py::test_ksam",
    "selection/test_selection.py::test_padding",
    "selection/test_selection.py::test_the_table",
    "selection/test_selection.py::test_an_index",
)
DEVICES = (
    "parallel/test_parallel_by_hand.py::test_value_and_grad",
    "parallel/test_parallel_by_hand.py::test_a_line_search",
    "parallel/test_parallel.py::test_weights",
    "parallel/test_parallel_by_hand.py::test_weights",
    "parallel/test_parallel_by_hand.py::test_readings",
    "parallel/test_parallel_by_hand.py::test_the_losses_of_one_device",
    "parallel/test_parallel_by_hand.py::test_accumulation",
    "parallel/test_parallel.py::test_aux",
)
CLIMBS = ("perturbations/test_directions_and_lengths.py",)
NOISES = ("variants/test_noise_loops.py::test_noise", "variants/test_limits.py::test_equal")
FINE_TUNING = ("variants/test_fine_tuning.py", "training/test_on_merged.py")
# Tests of a file, or of all files of a folder, beyond those of the rows.
PASSES = (
    "variants/test_pass_loops.py",
    "parallel/test_rows_on_devices.py::test_each_device",
    "perturbations/test_extra_gradients.py",
)
SUITES = {
    **dict.fromkeys(("variants/arwp.py", "variants/rwp.py"), NOISES),
    "variants/lpf_sgd.py": (*NOISES, "parallel/test_rows_on_devices.py::test_aux"),
    "variants/bsam.py": (
        "variants/test_noise_loops.py::test_bsam",
        "variants/test_bsam_rule.py",
        "parallel/test_rows_on_devices.py::test_aux",
    ),
    "variants/eigen_sam.py": (
        "variants/test_perturbation_loops.py::test_eigen",
        "variants/test_limits.py::test_eigen",
    ),
    "variants/_eigenvector.py": ("variants/test_perturbation_loops.py::test_eigen", *PASSES),
    **dict.fromkeys(
        [
            f"variants/{name}.py"
            for name in ("cr_sam", "gam", "lookbehind_sam", "sam_polyak", "sassha", "tsam")
        ],
        PASSES,
    ),
    **dict.fromkeys(("variants/x_sam.py", "variants/xsam.py", "variants/_states.py"), PASSES),
    **dict.fromkeys(
        (
            "variants/saf.py",
            "variants/mesa.py",
            "variants/_teacher.py",
            "selection/logits_table.py",
        ),
        (
            "variants/test_teachers.py",
            "variants/test_teacher_loops.py",
            "variants/test_limits.py::test_equal",
        ),
    ),
    **dict.fromkeys(
        (
            *("variants/functional_sam.py", "variants/logits_sam.py", "core/features.py"),
            *("variants/flat_lora.py", "variants/bi_lora.py", "core/merging.py"),
            "training/on_merged.py",
        ),
        FINE_TUNING,
    ),
    "variants/_layer_groups.py": ("variants/test_sl_sam.py", "variants/test_fine_tuning.py"),
    "variants/_moments.py": ("variants/test_moments.py",),
    "variants/_reuse.py": ("variants/test_reuse.py",),
    "variants/async_sam.py": (
        "variants/test_stale_loops.py::test_async",
        "perturbations/test_extra_gradients.py",
    ),
    "variants/ausam.py": EXAMPLES,
    "variants/ksam.py": EXAMPLES,
    "variants/lets.py": ("variants/test_lets_radius.py", "perturbations/test_extra_gradients.py"),
    "variants/looksam.py": ("variants/test_reuse.py", "perturbations/test_extra_gradients.py"),
    "variants/momentum_sam.py": ("variants/test_momentum_sam.py",),
    "variants/msam.py": (
        "variants/test_msam.py",
        "parallel/test_parallel.py::test_aux",
        "perturbations/test_extra_gradients.py",
    ),
    "variants/sl_sam.py": ("variants/test_sl_sam.py", "perturbations/test_extra_gradients.py"),
    "variants/": ("perturbations/test_extra_gradients.py",),
    "variants/esam.py": (
        *EXAMPLES,
        "selection/test_selection.py::test_strict",
        "variants/test_cost.py",
    ),
    "perturbations/filters.py": CLIMBS,
    "perturbations/gradient_steps.py": CLIMBS,
    "perturbations/noise.py": (*CLIMBS, *NOISES),
    "perturbations/spectral_ball.py": CLIMBS,
    "perturbations/z_score_ball.py": CLIMBS,
    "perturbations/balls.py": (*BALLS, "training/test_skip_nonfinite.py::test_an_infinite"),
    "perturbations/dynamic_mask.py": MASKS,
    "perturbations/fisher_mask.py": MASKS,
    "perturbations/patterns.py": MASKS,
    "perturbations/top_entries.py": MASKS,
    "perturbations/": BALLS,
    "policies/": (
        "policies/test_policies.py",
        "policies/test_quota.py",
        "policies/test_perturb_if.py",
    ),
    "core/closures.py": (
        "core/test_closures.py",
        *DEVICES,
        "training/test_accumulation.py",
        "training/test_freeze.py",
        "variants/test_msam.py",
    ),
    "core/devices.py": (
        *DEVICES,
        "selection/test_selection.py::test_devices",
        "selection/test_selection.py::test_weights",
        "asynchronous/test_async_state.py",
        "parallel/test_parallel.py::test_global",
    ),
    "core/hyperparams.py": (
        "core/test_keys.py",
        "core/test_arguments.py",
        "core/test_factory_errors.py",
    ),
    "policies/norms.py": ("policies/test_policies.py",),
    "policies/quota.py": ("policies/test_policies.py", "policies/test_quota.py"),
    "core/convolutions.py": ("core/test_convolutions.py",),
    "core/microbatches.py": (
        "variants/test_msam.py",
        "parallel/test_parallel.py::test_aux",
        "training/test_accumulation.py",
        "parallel/test_parallel_by_hand.py::test_accumulation",
        "variants/test_cost.py::test_msam",
    ),
    "core/readings.py": (
        "core/test_closures.py",
        "variants/test_contract.py::test_debug_infs",
        "perturbations/test_extra_gradients.py",
        *DEVICES,
    ),
    "core/sharp.py": (
        "variants/test_contract.py::test_integer",
        "training/test_half_precision.py::test_half_precision_parameters",
        "core/test_closures.py",
        *DEVICES,
    ),
    "core/transformation.py": (
        "core/test_transformation.py",
        "core/test_closures.py",
        "training/test_freeze.py",
        "training/test_preflight.py::test_nothing",
        "variants/test_contract.py::test_padding",
        *DEVICES,
    ),
    "core/captured.py": ("core/test_captured.py",),
    "core/draws.py": ("core/test_draws.py",),
    "core/slopes.py": ("variants/test_lets_radius.py", *DEVICES),
    "core/inspection.py": ("training/test_preflight.py",),
    "core/tree.py": (
        "core/test_norms.py",
        "core/test_update_errors.py",
        "variants/test_derivatives.py",
        *DEVICES,
    ),
    "core/": ("core/test_closures.py", *DEVICES),
    "selection/sam_step.py": (
        "variants/test_example_loops.py",
        "selection/test_selection.py",
        "selection/test_selection.py::test_weights_on_devices",
    ),
    "selection/": ("selection/test_selection.py", "selection/test_selection_on_a_mesh.py"),
    "losses.py": ("variants/test_bisam.py", "variants/test_teachers.py::test_the_loss"),
    "combinations.py": ("variants/test_reuse.py",),
    "averages/_running.py": ("averages/test_running.py",),
    "averages/_swad.py": ("averages/test_swad.py", "averages/test_running.py"),
    "averages/_evaluation.py": ("averages/test_evaluation.py",),
    "averages/": ("averages/test_running.py", "averages/test_swad.py"),
}
PARTNERS = {"minimum": "maximum", "maximum": "minimum"}


@dataclass(frozen=True)
class Mutation:
    """One changed expression.

    Attributes:
        file: The file, relative to the package.
        function: The function that holds the expression, with those around it.
        line: Its line.
        kind: What was done.
        before: The expression.
        after: What takes its place.
        source: The whole changed file.
    """

    file: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.function}: {self.before} -> {self.after}"


def mutations_of(path: Path) -> list[Mutation]:
    """Generate every mutation of a file."""
    found, whole = [], path.read_text().encode()
    starts = [0, *itertools.accumulate(map(len, whole.splitlines(keepends=True)))]

    def span(node):
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return starts[node.lineno - 1] + node.col_offset, end

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = f"{function}.{node.name}" if function else node.name
            children = node.body  # no decorators, defaults and annotations
        elif is_guard(node):
            children = []  # what wrong input raises has tests of its own
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        else:
            children = ast.iter_child_nodes(node)
        if function:
            for kind, after in changes(node):
                start, end = span(node)
                changed = whole[:start] + f"({after})".encode() + whole[end:]
                before = " ".join(whole[start:end].decode().split())
                where = str(path.relative_to(PACKAGE))
                found.append(
                    Mutation(*(where, function, node.lineno, kind, before, after), changed.decode())
                )
        for child in children:
            visit(child, function)

    visit(ast.parse(whole), "")
    return found


def is_guard(node: ast.AST) -> bool:
    """Whether a statement only checks its input."""
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        return True
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Constant) or (
        isinstance(call, ast.Call) and name_of(call.func).startswith("check")
    )


def is_text(node: ast.AST) -> bool:
    """Whether an operand is a text or a list of things."""
    is_number = isinstance(getattr(node, "value", None), int | float)
    return isinstance(node, ast.JoinedStr | ast.Tuple | ast.List) or (
        isinstance(node, ast.Constant) and not is_number
    )


def name_of(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Generate what may take the place of an expression: its kind, and the new text."""
    new = ast.unparse
    if isinstance(node, ast.BinOp):
        left, right = new(node.left), new(node.right)
        if any(map(is_text, (node.left, node.right))):
            return
        if isinstance(node.op, ast.Add):
            yield "flip a sign", f"({left}) - ({right})"
            if "eps" in name_of(node.right) or "TINY" in name_of(node.right):
                yield "drop an epsilon", left
            if isinstance(node.left, ast.BinOp) and isinstance(node.right, ast.BinOp):
                yield "skip an average", right
        elif isinstance(node.op, ast.Sub):
            yield "flip a sign", f"({left}) + ({right})"
        elif isinstance(node.op, ast.Mult | ast.Div):
            yield "drop a factor", left
        elif isinstance(node.op, ast.Pow):
            yield "drop a power", left
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            yield "flip a sign", new(node.operand)
        elif isinstance(node.op, ast.Not):
            yield "turn a condition", new(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        if not isinstance(node.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn):
            yield "turn a condition", f"({new(node)}) ^ True"  # for arrays too
    elif isinstance(node, ast.Call):
        name, arguments = name_of(node.func), [new(a) for a in node.args]
        function = new(node.func)
        keywords = [new(k) for k in node.keywords]
        if name == "at_step":
            value, step = arguments
            yield "freeze a schedule", f"{function}({value}, 0 * {step})"
        if name in AVERAGES and arguments:
            yield "skip an average", arguments[-1]
        if name in ORDERED and len(arguments) >= 2:
            swapped = [*arguments[:-2], arguments[-1], arguments[-2]]
            if name not in PARTNERS:
                yield "swap two arguments", f"{function}({', '.join([*swapped, *keywords])})"
        if name in PARTNERS:
            other = function[: -len(name)] + PARTNERS[name]
            yield "take the other function", f"{other}({', '.join([*arguments, *keywords])})"


class Loader(importlib.machinery.SourceFileLoader):
    """Load a module from another text than that of its file."""

    def __init__(self, name, path, text):
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec", dont_inherit=True)


class Finder:
    """Find one file's module with a changed text."""

    def __init__(self, mutation):
        self.path, self.text = str(PACKAGE / mutation.file), mutation.source

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith("samx"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin == self.path:
            spec.loader = Loader(fullname, self.path, self.text)
        return spec


@contextlib.contextmanager
def applied(mutation: Mutation):
    """Import samx and the helpers with a mutation; behind this, everything is as it was."""

    helpers = {path.stem for path in SUPPORT.glob("*.py")} - {*WITHOUT_SAMX}

    def ours():
        return [n for n in sys.modules if n.split(".")[0] in ("samx", *helpers)]

    kept, finder = {name: sys.modules.pop(name) for name in ours()}, Finder(mutation)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)


@functools.cache
def lines_of(name: str) -> frozenset[tuple[str, int]]:
    """Return the lines of samx that a row runs through, as (file, line)."""
    seen = set()

    def trace(frame, event, arg):
        file = frame.f_code.co_filename
        if not file.startswith(str(PACKAGE)):
            return None

        def local(frame, event, arg):
            seen.add((file[len(str(PACKAGE)) + 1 :], frame.f_lineno))
            return local

        return local(frame, event, arg)

    case, (data, params) = cases.VARIANTS[name], problem.make()
    batch, before = problem.batch_at(data, 0), sys.gettrace()
    runs = [recorded.RECORDED[oracle] for oracle in case.oracle if isinstance(oracle, str)]
    sys.settrace(trace)
    try:
        built = [
            case.build(batch_like=batch),
            *(case.make(run.base, run.arguments) for run in runs),
        ]
        for tx in built:
            state = jax.eval_shape(tx.init, params)
            with contextlib.suppress(Exception):  # a run with other parameters
                jax.eval_shape(problem.make_step(tx), params, state, batch)
    finally:
        sys.settrace(before)
    return frozenset(seen)


def rows_through(mutation: Mutation) -> list[str]:
    """Return rows that run through a mutation: those of its file, or else those of other files."""
    module = "samx." + mutation.file.removesuffix(".py").replace("/", ".")

    def through(names):
        return (name for name in names if (mutation.file, mutation.line) in lines_of(name))

    made_here = [name for name, case in cases.VARIANTS.items() if module == module_of(case)]
    own = [*through(made_here)]
    others = dict.fromkeys([*cases.KINDS, *cases.VARIANTS])
    return own or [*itertools.islice(through(others), MOST_ROWS)]


def module_of(case) -> str:
    (entry,) = samx.catalog(case.entry)
    return entry.factory.__module__


def is_caught(mutation: Mutation, by_suites: bool = True) -> bool:
    """Whether a row fails, a suite fails, or the package cannot be imported."""
    with jax.enable_x64(True):
        rows = rows_through(mutation)
    suites = SUITES[max((start for start in SUITES if mutation.file.startswith(start)), key=len)]
    try:
        with applied(mutation):
            with time_limit(), jax.enable_x64(True):
                for check in importlib.import_module("checks").CHECKS:
                    for name in rows:
                        check(name)
            if by_suites:
                run_suites(suites)
    except (Exception, pytest.fail.Exception):  # the second where `pytest.raises` saw nothing
        return True
    return False


@contextlib.contextmanager
def time_limit():
    """Raise if this process has computed for too long: a loop without an end is a failure too."""

    def stop(number, frame):
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_suites(suites: Sequence[str]) -> None:
    """Run tests in this process, with the modules that are imported now.

    A suite is `file` or `file::how their names begin`. Slow ones run if it is the whole name.
    """
    for suite in suites:
        file, _, only = suite.partition("::")
        run_suite(SUPPORT.parent / file, only or "test_")


def run_suite(file: Path, only: str) -> None:
    spec = importlib.util.spec_from_file_location(f"mutated_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    common = as_list(getattr(module, "pytestmark", []))
    for name, function in vars(module).items():
        marks = [*common, *getattr(function, "pytestmark", [])]
        if not (name == only if is_slow(marks) else name.startswith(only)):
            continue
        used = [argument for mark in marks if mark.name == "usefixtures" for argument in mark.args]
        wanted = set(inspect.signature(function).parameters)
        for arguments in every_setting(marks):
            fixtures = {*wanted, *used} - set(arguments)
            if fixtures - {"float64", "monkeypatch"}:
                continue
            with jax.enable_x64("float64" in fixtures), pytest.MonkeyPatch.context() as patch:
                given = {"float64": None, "monkeypatch": patch}
                function(**arguments, **{k: given[k] for k in fixtures & wanted})


def is_slow(marks):
    return any(mark.name == "slow" for mark in marks)


def as_list(value):
    return value if isinstance(value, list) else [value]


def every_setting(marks):
    """Generate the arguments of every setting of a test."""
    tables = []
    for mark in marks:
        if mark.name == "parametrize":
            names, values = mark.args
            values = [value for value in values if not is_slow(getattr(value, "marks", ()))]
            names = (
                names if isinstance(names, tuple | list) else [n.strip() for n in names.split(",")]
            )
            rows = [getattr(value, "values", value) for value in values]
            rows = [
                row if len(names) > 1 or hasattr(value, "values") else (row,)
                for row, value in zip(rows, values, strict=True)
            ]
            tables.append([dict(zip(names, row, strict=True)) for row in rows])
    for rows in itertools.product(*tables):
        yield {name: value for row in rows for name, value in row.items()}
