"""The server, with two ways to fail on request: for drills only.

    python -m deploy.faults FOLDER --port 8123 --model mine=./llama

What stands after FOLDER goes to `python -m service`. While FOLDER holds a file `hang`, no step
ends; a file `die` ends the engine at its next step. Neither happens by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastiformer import ElasticModel
from service.__main__ import main as serve

HANG, DIE = "hang", "die"
_LOOK_SECONDS = 0.05


def main(argv: Sequence[str]) -> int:
    folder, *rest = argv
    install(Path(folder))
    return serve(rest)


def install(folder: Path) -> None:
    """From now on every step looks into the folder first."""
    real = ElasticModel.step

    def step(self: ElasticModel, chunks: Any) -> Any:
        while (folder / HANG).exists():
            time.sleep(_LOOK_SECONDS)
        if (folder / DIE).exists():
            raise SystemExit("the drill ends this engine")
        return real(self, chunks)

    ElasticModel.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
