"""BibTeX entries of the papers in the catalog."""

from typing import Any

PROCEEDINGS = {
    "AAAI": "AAAI Conference on Artificial Intelligence",
    "AISTATS": "International Conference on Artificial Intelligence and Statistics",
    "CVPR": "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    "ECML-PKDD": "Machine Learning and Knowledge Discovery in Databases",
    "ICCV": "IEEE/CVF International Conference on Computer Vision",
    "ICLR": "International Conference on Learning Representations",
    "ICML": "International Conference on Machine Learning",
    "KDD": "ACM SIGKDD Conference on Knowledge Discovery and Data Mining",
    "NeurIPS": "Advances in Neural Information Processing Systems",
}
JOURNALS = {
    "JMLR": "Journal of Machine Learning Research",
    "Neural Networks": "Neural Networks",
    "TMLR": "Transactions on Machine Learning Research",
}
LATEX = {"ø": r"{\o}", "ç": r"{\c{c}}", "ö": r"{\"o}", "ü": r"{\"u}", "µP²": r"$\mu$P$^2$"}


def bibtex(entry: Any) -> str:
    """Return the BibTeX entry of an entry's paper, in ASCII."""
    if entry.venue in JOURNALS:
        kind, where = "article", {"journal": JOURNALS[entry.venue]}
    elif entry.venue:
        name = f"{PROCEEDINGS[entry.venue]} ({entry.venue})"
        kind, where = "inproceedings", {"booktitle": name}
    else:
        kind, where = "misc", {}
    fields = {
        "title": f"{{{entry.paper}}}",
        "author": entry.authors,
        **where,
        "year": entry.year,
        "eprint": entry.arxiv,
        "archivePrefix": "arXiv",
        "url": entry.url,
    }
    lines = [f"@{kind}{{{entry.key},"]
    lines += [f"  {name} = {{{value}}}," for name, value in fields.items()]
    text = "\n".join([*lines, "}"])
    for letters, latex in LATEX.items():
        text = text.replace(letters, latex)
    return text
