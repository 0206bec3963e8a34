"""The catalog: every variant, its paper, what it needs, what it costs, and how sure we are.

One table, `samx.catalog.table`, and one card for each row, `samx.catalog.cards`. The tests, the
examples and the pages of the book take their rows from them.
"""

from fnmatch import fnmatchcase

from samx.catalog.table import ENTRIES, SHAPES, Entry


class Catalog(tuple[Entry, ...]):
    """Rows of the catalog: a tuple that prints as a table, and a single row as its card.

    Example:
        >>> import samx
        >>> rows = samx.catalog("lightsam")
        >>> len(rows), rows[0].name
        (3, 'lightsam_norm')
    """

    def __repr__(self) -> str:
        """Return the table as plain text, of a single row its card."""
        if len(self) == 1:
            return self[0].card()
        head = ("name", "published", "shape", "closures", "gradients", "state")
        rows = [
            (
                entry.name,
                entry.published,
                SHAPES[entry.shape],
                ", ".join(entry.closures),
                entry.gradients,
                entry.state,
            )
            for entry in self
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [head, tuple("-" * width for width in widths), *rows]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def bibtex(self) -> str:
        """Return the BibTeX entries of the papers, each one once.

        Example:
            >>> import samx
            >>> samx.catalog("lightsam").bibtex().count("@")
            1
        """
        return "\n\n".join(dict.fromkeys(entry.bibtex() for entry in self))


def catalog(pattern: str = "*") -> Catalog:
    """List the variants, or search them.

        catalog("look*")       names and methods that match the pattern
        catalog("sam")         the row of that name
        catalog("long-tail")   names, methods and titles that contain the words
        catalog("2010.01412")  the rows of a paper, by arXiv number or BibTeX key

    Args:
        pattern: With `*`, `?` or `[`, a pattern for the whole name or method; otherwise a name, an
            arXiv number, a BibTeX key, or a part of a name, a method or a title. Case does not
            matter, nor whether words are joined by spaces, `-` or `_`. Default all.

    Returns:
        A tuple of rows that prints as a table, empty if nothing matches. A single row prints as
        its method card. A row has the fields `name`, `factory`, `call`, `method`, `paper`,
        `authors`, `venue`, `year`, `arxiv`, `url`, `key`, `shape`, `closures`, `gradients`, `state`
        and `fidelity`, and the methods `card()`, `formula()`, `doubts()` and `bibtex()`.
        `catalog(...).bibtex()` has the BibTeX entries of all rows.

    Raises:
        TypeError: If `pattern` is not a string.

    Example:
        >>> import samx
        >>> samx.catalog("look*")
        name            published  shape             closures  gradients          state
        --------------  ---------  ----------------  --------  -----------------  -----
        looksam         CVPR 2022  first in a chain  value_fn  1 + 1/period       1 P
        look_layer_sam  CVPR 2022  first in a chain  value_fn  1 + 1/period       1 P
        lookbehind_sam  ICML 2024  wraps the base    value_fn  k + 1, sequential  0
        >>> [entry.name for entry in samx.catalog("long-tailed")]
        ['focal_sam']

    References:
        Each row names its paper.

    Notes:
        Cost: none.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"catalog: `pattern` must be a string, got {type(pattern).__name__}")
    wanted = _plain(pattern)

    def matches(entry: Entry) -> bool:
        names = _plain(entry.name), _plain(entry.method)
        if any(sign in wanted for sign in "*?["):
            return any(fnmatchcase(name, wanted) for name in names)
        texts = *names, _plain(entry.paper), entry.arxiv, entry.key
        return any(wanted in text for text in texts)

    exact = [entry for entry in ENTRIES if _plain(entry.name) == wanted]
    return Catalog(exact or filter(matches, ENTRIES))


def _plain(text: str) -> str:
    """Return the text as it is compared: lower case, words joined by `_`, µP² as `mup2`."""
    text = text.strip().casefold().replace("μ", "mu").replace("²", "2")
    return text.replace("-", "_").replace(" ", "_")
