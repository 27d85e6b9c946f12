"""What stands on the command line, with its bounds: what is outside is refused with both named."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from elastiformer import Unit
from training.files import DataError


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers of at least `least`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number; got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"at least {least}; got {value}")
        return value

    return number


def real(
    above: float | None = None,
    least: float | None = None,
    below: float = math.inf,
    most: float | None = None,
) -> Parser:
    """A parser of numbers above or at least the one, and below or at most the other bound."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a number; got {text!r}") from None
        inside = value < below  # NaN is not
        bounds = [] if below == math.inf else [f"below {below:g}"]
        if most is not None:
            inside, bounds = inside and value <= most, [f"at most {most:g}"]
        if least is not None:
            inside, bounds = inside and value >= least, [f"at least {least:g}", *bounds]
        if above is not None:
            inside, bounds = inside and value > above, [f"above {above:g}", *bounds]
        if not inside:
            raise argparse.ArgumentTypeError(f"{' and '.join(bounds) or 'finite'}; got {text}")
        return value

    return number


Parser = Callable[[str], float]


SPREAD = "what an even spread of the kept image tokens weighs beside the router's scores"

FILES = ("base", "adapter", "data", "held_out", "test", "out")  # of which the name is enough

LAYER_UNITS = tuple(unit for unit in Unit if unit is not Unit.IMAGE_TOKENS)


def units(text: str) -> tuple[Unit, ...]:
    """Comma-separated units, each once; "none" leaves out whole sub-layers only."""
    if text == "none":
        return ()
    known = {unit.value: unit for unit in Unit}
    return tuple(known[name] for name in names(text, "unit", known))


def names(text: str, what: str, known: Collection[str]) -> list[str]:
    """Comma-separated names of what is known, each once."""
    found = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if stray := [name for name in found if name not in known]:
        raise argparse.ArgumentTypeError(
            f"unknown {what} {', '.join(stray)}; known: {', '.join(known)}"
        )
    return found


def refuse_unused(
    args: argparse.Namespace,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    names: Iterable[str],
    model: str,
) -> None:
    """Refuse what was set and would change nothing.

    Args:
        names: of options that this sort of model has no use for.

    Raises:
        DataError: one of them has another value than its default.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name in names:
        if (value := getattr(args, name)) != parser.get_default(name):
            raise DataError(f"--{name.replace('_', '-')}: {model} has no use for it; got {value}")


def command_line(
    command: str,
    args: argparse.Namespace,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    free: Collection[str],
) -> str:
    """What ran, without where its files lie, and without what is as it is anyhow.

    Args:
        free: options that say nothing about what is measured.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [f"python -m training {command}"]
    for name, value in vars(args).items():
        if name in FILES:
            value = Path(value).name
        elif name in free or value == parser.get_default(name):
            continue
        several = value if isinstance(value, list) and isinstance(value[0], tuple) else [value]
        flag = f"--{name.replace('_', '-')}"
        words += [f"{flag} {shlex.quote(_written(each))}" for each in several]
    return " ".join(words)


def _written(value: object) -> str:
    """A value as it stands on the command line."""
    match value:
        case (str(name), tuple(values)):  # a name and what belongs to it
            return f"{name}={','.join(values)}"
        case list() | tuple():
            return ",".join(map(_written, value))
        case float():
            return f"{value:g}"
    return str(value)
