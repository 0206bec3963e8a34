"""Settings of the book. From the root of a clone: `python -m sphinx -W notebooks runs/book`."""

import re

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

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "samx"


def setup(app):
    """Make links to Markdown files outside of the book downloads, as other files are by default."""

    def outside(_, docname, source):
        source[0] = re.sub(r"\]\((\.\./[^)#]*\.md)\)", r"](path:\1)", source[0])

    app.connect("source-read", outside)
