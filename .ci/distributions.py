"""Check what the wheel and the source distribution hold, file by file.

    python .ci/distributions.py dist

Run it in the root of the project, after `python -m build --outdir dist`. The wheel holds the
package; the source distribution also what it takes to test it and to build the book.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

FOLDERS = ("samx", "tests", "examples", "notebooks", ".github")
FILES = ("CITATION.cff", "LICENSE", "README.md", "pyproject.toml", ".gitignore")
GENERATED = ("__pycache__", ".ipynb_checkpoints")


def files_in(folder):
    """Return the files below a folder that belong to the project."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not any(part in GENERATED for part in path.parts)}


def compare(kind, held, wanted):
    """End with an error if the files differ."""
    missing, extra = sorted(wanted - held), sorted(held - wanted)
    if missing or extra:
        sys.exit(f"{kind}: missing {missing}, not wanted {extra}")
    print(f"{kind}: {len(held)} files")


def main(folder):
    """Compare both distributions in the folder with the project."""
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    compare("wheel", names, files_in("samx"))

    (sdist,) = Path(folder).glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {*FILES, "PKG-INFO"}.union(*map(files_in, FOLDERS))
    compare("source distribution", names, wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
