"""The lowest versions that pyproject.toml allows of all that it names, as constraints for pip: a line each.

Owns one exception: torch. Its lowest wheel for Linux brings gigabytes of CUDA along, so it stays the version that the
other tests run on. For scripts/test-lowest; must not import anything that is not in Python itself.
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
EXCEPT = {"torch": "2.13.0"}


def main() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for line in sorted({constraint(requirement) for requirements in lists for requirement in requirements} - {""}):
        print(line)


def constraint(requirement: str) -> str:
    """`name==lowest`; nothing for a name without a lowest version, such as types for mypy."""
    found = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:,<[\w.]+)?", requirement)
    if found is None:
        if re.search(r"[<>=!~ ;]", requirement):
            raise SystemExit(f"expected NAME[EXTRA]>=LOWEST,<LIMIT in pyproject.toml, found {requirement!r}.")
        return ""
    name, lowest = found.groups()
    return f"{name}=={EXCEPT.get(name, lowest)}"


if __name__ == "__main__":
    main()
