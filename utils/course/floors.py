"""The oldest versions that pyproject.toml allows, as pins for `make test-floor`. Run by its path; needs no package.

Usage: python utils/course/floors.py pyproject.toml > floors.txt
"""

import re
import sys
import tomllib
from pathlib import Path

FLOOR = re.compile(r"^([A-Za-z0-9._-]+)>=([A-Za-z0-9.]+)(?:; .+)?$")  # after a semicolon: on which systems


def floors(pyproject: Path) -> list[str]:
    """["torch==2.8", ...]; ValueError for a requirement that is not of the form name>=version."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    requirements = project["dependencies"] + [requirement for extra in extras for requirement in extra]
    pins = []
    for requirement in requirements:
        if requirement.startswith(project["name"] + "["):
            continue  # one extra that includes another
        match = FLOOR.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} must read name>=version, so that its lower end can be tested.")
        pins.append("{}=={}".format(*match.groups()))
    return sorted(pins)


if __name__ == "__main__":
    print("\n".join(floors(Path(sys.argv[1]))))
