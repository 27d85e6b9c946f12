"""The Dockerfile, read: its stages, what each begins from, and the variables that each sets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
BASE_PATH = "/usr/local/bin:/usr/bin:/bin"  # of Python's own image
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass
class Stage:
    """One FROM, and the instructions up to the next."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def texts(self, word: str) -> list[str]:
        return [text for step, text in self.steps if step == word]

    def arguments(self) -> dict[str, str]:
        """Its build arguments, with their defaults."""
        return {
            name: value for name, _, value in (each.partition("=") for each in self.texts("ARG"))
        }


def read_stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(base, name)
        elif word and stage is not None:
            stage.steps.append((word, rest.strip()))
    return stages


STAGES = read_stages()


def line_of(name: str) -> list[Stage]:
    """A stage with those that it begins from, the first one first."""
    stage = STAGES[name]
    return ([*line_of(stage.base)] if stage.base in STAGES else []) + [stage]


def variables_of(name: str, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """What ENV has set at the end of a stage: build arguments as given, else their defaults."""
    held = {"PATH": BASE_PATH}
    for stage in line_of(name):
        known = stage.arguments()
        known |= {argument: value for argument, value in (given or {}).items() if argument in known}
        for text in stage.texts("ENV"):
            seen = known | held

            def value(found: re.Match[str], seen: Mapping[str, str] = seen) -> str:
                return seen[found[1] or found[2]]

            for each in shlex.split(text):
                variable, _, written = each.partition("=")
                held[variable] = _VARIABLE.sub(value, written)
    return held
