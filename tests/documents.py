"""What README and the operator's guide are held against: settings, and commands that exist."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

from pydantic.fields import FieldInfo
from torch.distributed.run import get_args_parser

from service.__main__ import flag
from service.__main__ import parser as service_parser
from service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def blocks(text: str, language: str) -> list[str]:
    """All fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def lines(text: str, language: str) -> list[str]:
    """The lines of all of them."""
    return "".join(blocks(text, language)).splitlines()


def settings_rows() -> list[str]:
    """How the row of each setting begins: its variable, its flag, its default."""
    return [
        f"| `ELASTI_{name.upper()}` | `{flag(name)}` | {_shown_default(field)} |"
        for name, field in Settings.model_fields.items()
    ]


def _shown_default(field: FieldInfo) -> str:
    default = field.default
    if default is None or default == ():
        return "none"
    if isinstance(default, dict):
        return f"`{', '.join(f'{key}: {value}' for key, value in default.items())}`"
    return f"`{default}`"


def targets() -> set[str]:
    """What `make` can be asked for."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))


def words_of(command: str) -> list[str]:
    """A command's words, without variables set before it."""
    words = shlex.split(command)
    while "=" in words[0]:
        words = words[1:]
    return words


def is_ours(words: list[str]) -> bool:
    """Whether a command is one of the project's own; then its options are checked, too."""
    if words[0] == "make":
        assert set(words[1:]) <= targets()
    elif words[:3] == ["python", "-m", "service"]:
        service_parser().parse_args(words[3:])
    elif words[:2] == ["python", "-m"] and words[2] in ("training", "benchmarks"):
        module = importlib.import_module(f"{words[2]}.{words[3]}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args(words[4:])
    elif words[0] == "torchrun" and "…" not in words:
        get_args_parser().parse_args(words[1:])
        return is_ours(["python", *words[words.index("-m") :]])
    elif words[:2] == ["python", "-m"] and words[2].startswith("deploy."):
        assert importlib.util.find_spec(words[2])
    elif words[0] == "serve":
        assert words[1] in ("run", "deploy") and (ROOT / words[2]).is_file()
    else:
        return False
    return True
