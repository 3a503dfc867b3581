"""Print, for pip, the project's requirements without upper bounds: the newest of everything that the registry offers.

python -m tests.newest            # requirements
python -m tests.newest --report   # what is installed, beside the ranges that pyproject.toml allows
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

EXTRAS = ("gguf", "finetune", "train", "pretrain", "chat")
TOOLS = ("hypothesis", "pytest", "pytest-xdist", "selenium", "packaging")
_UPPER_BOUND = re.compile(r",?<=?[\d.]+")


def requirements() -> list[str]:
    """Requirements of the package and of the extras that the tests need, as pyproject.toml has them."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return sorted({line for line in listed if not line.startswith(project["name"])}) + list(TOOLS)


def report() -> None:
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements()):
        installed = version(requirement.name)
        inside = requirement.specifier.contains(installed, prereleases=True)
        note = "" if inside else f"   OUTSIDE of {requirement.specifier}"
        print(f"{requirement.name:<16} {installed}{note}")


if __name__ == "__main__":
    if "--report" in sys.argv:
        report()
    else:
        print("\n".join(_UPPER_BOUND.sub("", line) for line in requirements()))
