"""What an image installs: the project's dependencies, and those of the extras asked for.

    python needed.py service,tracing > needed.txt

Reads the pyproject.toml beside which it is started. Names are parted by commas; empty ones count
for nothing.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> int:
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    known = project["optional-dependencies"]
    asked = [name for name in (each.strip() for each in ",".join(sys.argv[1:]).split(",")) if name]
    unknown = [name for name in asked if name not in known]
    if unknown:
        names, there = ", ".join(unknown), ", ".join(known)
        print(f"EXTRAS: no extra is called {names}; there are {there}", file=sys.stderr)
        return 1
    print(*project["dependencies"], *(each for name in asked for each in known[name]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
