"""Settings of the book. From the root of a clone: `python -m sphinx -W notebooks runs/book`."""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

import samx

project = "samx"
author = "The samx developers"
copyright = "2026, the samx developers"
release = version = samx.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["**.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
templates_path = []
nitpicky = False

# The outputs in the repository are shown. `-D nb_execution_mode=force` executes the notebooks.
nb_execution_mode = "off"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "warn"  # with -W, an error
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

default_role = "literal"  # single backticks in docstrings are code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_math_renderer = "mathml"  # part of the page: formulas need no script from elsewhere
html_title = "samx"
html_static_path = ["_static"]
html_css_files = ["book.css"]


SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|References|Notes):$")


def adapt_docstring(app, what, name, obj, options, lines):
    """Adapt a docstring to reStructuredText, in place.

    Indented blocks before the first section are update rules: they become literal blocks. Bars
    outside of backticks are norms, not substitutions. "`leaf`s" needs a separator.
    """
    end = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
    written, inside = [], False
    for line in lines[:end]:
        if line.startswith("    ") and not inside:
            written += [".. code-block:: text", ""]
        inside = line.startswith("    ") or (inside and not line)
        written.append(line if inside else adapt_line(line))
    lines[:] = written + [adapt_line(line) for line in lines[end:]]


def adapt_line(line):
    """Return a line of prose for reStructuredText; examples stay as they are."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", "".join(parts))


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the fields of a NamedTuple: "Attributes" in its docstring describes them."""
    return True if "Alias for field number" in (getattr(obj, "__doc__", None) or "") else None


def link_documents(app, name, content):
    """Let a link to a Markdown file outside of the book, `../FILE.md`, open that file."""
    content[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(#[^)]*)?\)", r"](<path:\1>)", content[0])


def write_math(display):
    """Return a visitor that writes a formula as MathML."""

    def visit(translator, node):
        translator.body.append(convert(node.astext(), display=display))
        raise SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", write_math("inline"), write_math("block"))
    app.connect("autodoc-process-docstring", adapt_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("source-read", link_documents)
