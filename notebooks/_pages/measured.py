"""Take the radii that `examples/digits.py` chose into the method cards.

    python examples/digits.py --variants all
    cp runs/digits-001/summary.json examples/compare/results/digits.json
    python notebooks/_pages/measured.py examples/compare/results/digits.json ...
    python notebooks/_pages/write.py

Writes `samx/catalog/measured.py`. Radii of variants and bases that are not in these results stay.
"""

import json
import sys
from pathlib import Path

from samx.catalog.measured import DIGITS

TARGET = Path(__file__).parents[2] / "samx" / "catalog" / "measured.py"
HEAD = '''"""Radii that `examples/digits.py` chose on validation data, by variant and base.

Of each pair, the first is for the share of wrong labels of that script, the second for clean
labels. `python notebooks/_pages/measured.py SUMMARY.json` writes this file from its summary.
"""

DIGITS: dict[str, dict[str, tuple[float, float]]] = {
'''


def radii(path: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the radii in the summary of one run."""
    report = json.loads(path.read_text())
    base, noise = report["settings"]["base"], report["settings"]["noise"]
    rows: dict[str, dict[float, float]] = {}
    for result in report["rows"]:
        rows.setdefault(result["row"].replace("-", "_"), {})[result["noise"]] = result["rho"]
    return {
        name: {base: (by_noise[noise], by_noise[0.0])}
        for name, by_noise in rows.items()
        if name not in ("base", "base2x")
    }


def main(paths: list[str]) -> None:
    """Merge the radii of all summaries into the file."""
    merged = {name: dict(by_base) for name, by_base in DIGITS.items()}
    for path in paths:
        for name, by_base in radii(Path(path)).items():
            merged.setdefault(name, {}).update(by_base)
    lines = []
    for name, by_base in sorted(merged.items()):
        pairs = ", ".join(f'"{base}": {pair}' for base, pair in sorted(by_base.items()))
        lines.append(f'    "{name}": {{{pairs}}},\n')
    TARGET.write_text("".join([HEAD, *lines, "}\n"]))


if __name__ == "__main__":
    main(sys.argv[1:])
