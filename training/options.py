"""Numbers on the command line, each with its bounds: one outside is refused with both named."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


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


def real(above: float | None = None, least: float | None = None, below: float = math.inf) -> Parser:
    """A parser of numbers above `above`, or at least `least`, and below `below`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a number; got {text!r}") from None
        inside = value < below  # NaN is not
        bounds = [] if below == math.inf else [f"below {below:g}"]
        if least is not None:
            inside, bounds = inside and value >= least, [f"at least {least:g}", *bounds]
        if above is not None:
            inside, bounds = inside and value > above, [f"above {above:g}", *bounds]
        if not inside:
            raise argparse.ArgumentTypeError(f"{' and '.join(bounds) or 'finite'}; got {text}")
        return value

    return number


Parser = Callable[[str], float]
