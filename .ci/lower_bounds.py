"""Print the lowest supported releases as constraints for pip: every `name>=bound` as `name==bound`.

    python .ci/lower_bounds.py test > lowest.txt
    python -m pip install -e '.[test]' -c lowest.txt

Arguments are extras; the dependencies of the package itself are always printed. Extras that name
other extras of samx are followed. Needs Python 3.11 and nothing else.
"""

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(\[(?P<extras>[^]]*)\])?(>=(?P<bound>[\w.]+))?(?P<marker> *;.*)?"
)


def lower_bounds(project, extras):
    """Return the constraints of the dependencies and of `extras`, sorted."""
    requirements, waiting, seen = list(project["dependencies"]), list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra not in seen:
            seen.add(extra)
            requirements += project["optional-dependencies"][extra]
            for requirement in project["optional-dependencies"][extra]:
                match = REQUIREMENT.fullmatch(requirement)
                if match["name"] == project["name"]:
                    waiting += match["extras"].split(",")
    found = set()
    for requirement in requirements:
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise SystemExit(f"not of the form name>=bound: {requirement}")
        if match["bound"]:
            found.add(f"{match['name']}=={match['bound']}{match['marker'] or ''}")
    return sorted(found)


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "pyproject.toml"
    print(*lower_bounds(tomllib.loads(file.read_text())["project"], sys.argv[1:]), sep="\n")
