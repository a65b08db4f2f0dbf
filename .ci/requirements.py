"""Prints what an extra of pyproject.toml requires, but efftune itself: what installs that would compile csrc again.

python .ci/requirements.py test
"""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    PROJECT = tomllib.load(file)["project"]


def required(extra: str) -> list[str]:
    found = []
    for one in PROJECT["optional-dependencies"][extra]:
        own = re.fullmatch(r"efftune\[(.*)\]", one)
        found += sum(map(required, own[1].split(",")), []) if own else [one]
    return found


print(*PROJECT["dependencies"], *required(sys.argv[1]), sep="\n")
