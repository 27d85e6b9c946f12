"""From what a request says about capacity to what it gets, and who limited it.

Precedence: body, alias, header, effort, the key's default, the server's default. Ceilings come
last: the key's, the server's, and that of the load (load.py), which spares callers who named a
capacity unless the operator wants otherwise. A caller's own number is never changed silently: below
a model's range it is refused by the engine. A default of the server's that a model cannot go down
to is lifted to the model's lowest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from elastiformer.capacity import DENSE, Capacity, Share
from elastiformer.errors import CapacityError
from service.load import ceiling as ceiling_under
from service.settings import Key, Limited

AUTO = "auto"
HEADER = "X-Elasti-Capacity"


@dataclass(frozen=True, slots=True)
class Asked:
    """The knob in all its forms; None where a request does not use one."""

    body: object = None
    alias: str | None = None
    header: str | None = None
    effort: str | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """What was asked, as JSON; what is applied; and what stood in between, if anything."""

    requested: object
    applied: Capacity
    limited_by: str | None = None
    most: Capacity = DENSE  # what the caller named; without it all

    @property
    def is_auto(self) -> bool:
        return self.requested == AUTO

    @property
    def tier(self) -> str:
        """The applied capacity rounded down to steps of 0.1: a label with few values."""
        if self.is_auto:
            return AUTO
        share = self.applied.prompt
        if not isinstance(share, float) or share != self.applied.output:
            return "mixed"
        return f"{int(share * 10 + 1e-9) / 10:.1f}"


@dataclass(frozen=True, slots=True)
class Knob:
    """The server's side: its default, its table of efforts, its ceiling, whom load limits."""

    default: Capacity = DENSE
    effort: Mapping[str, Capacity] = field(default_factory=dict)
    ceiling: float = 1.0
    load_limits: Limited = "auto"
    load_floor: float = 0.5

    def resolve(
        self, asked: Asked, key: Key | None, lowest: float, pressure: float = 0.0
    ) -> Resolved:
        """Decide on a capacity, for a model whose capacities begin at `lowest`.

        Args:
            pressure: on the model's engine, from 0 to 1.

        Raises:
            CapacityError: any form of the knob that is present and wrong, used or not.
        """
        own = _first(
            _read(asked.body, "capacity"),
            _read(_from_text(asked.alias), "model"),
            _read(_from_text(asked.header), HEADER),
        )
        by_effort = self._effort(asked.effort)
        if own is not None:
            applied, requested, limited_by = own, own.as_json(), None
            if own is _AUTO_CAPACITY:
                requested = AUTO
                applied, limited_by = _lifted(self.default, lowest)
        else:
            chosen = _first(by_effort, key.capacity if key else None) or self.default
            requested = chosen.as_json()
            applied, limited_by = _lifted(chosen, lowest)
        ceilings = [("key", key.ceiling if key else 1.0), ("server", self.ceiling)]
        is_auto, is_unnamed = own is _AUTO_CAPACITY, own is None and by_effort is None
        yields = {"auto": is_auto, "unnamed": is_auto or is_unnamed, "all": True}
        if yields.get(self.load_limits, False):
            ceilings.append(("load", self.load_ceiling(pressure, lowest, key)))
        for name, ceiling in ceilings:
            below = applied.limited(max(ceiling, lowest))
            if below != applied:
                applied, limited_by = below, name
        return Resolved(requested, applied, limited_by, most=own or DENSE)

    def load_ceiling(self, pressure: float, lowest: float, key: Key | None = None) -> float:
        """The most that load leaves to whom it may limit."""
        if self.load_limits == "nobody":
            return 1.0
        own = key.floor if key is not None else None
        floor = self.load_floor if own is None else own
        return ceiling_under(pressure, max(floor, lowest))

    def _effort(self, effort: str | None) -> Capacity | None:
        if effort is None:
            return None
        if effort not in self.effort:
            raise CapacityError(
                f"reasoning_effort: one of {', '.join(self.effort)}; got {effort!r}"
            )
        return self.effort[effort]


# Compared by identity: it stands for "auto" between reading and deciding.
_AUTO_CAPACITY = replace(DENSE)


def _read(value: object, name: str) -> Capacity | None:
    if value is None:
        return None
    if value == AUTO:
        return _AUTO_CAPACITY
    try:
        return Capacity.parse(value, name)
    except CapacityError:
        if isinstance(value, Mapping):
            raise
        # The library knows no "auto", so its sentence about a value by itself lacks that.
        raise CapacityError(
            f'{name}: a fraction of the dense compute, above 0 and at most 1, "{AUTO}", or an '
            f"object of keep shares; got {value!r}"
        ) from None


def _from_text(text: str | None) -> object:
    """A header and an alias are text: a number, `auto`, or a JSON object."""
    if text is None:
        return None
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if value is None else value


def _first(*capacities: Capacity | None) -> Capacity | None:
    return next((capacity for capacity in capacities if capacity is not None), None)


def _lifted(capacity: Capacity, lowest: float) -> tuple[Capacity, str | None]:
    lifted = Capacity(_at_least(capacity.prompt, lowest), _at_least(capacity.output, lowest))
    return lifted, None if lifted == capacity else "model"


def _at_least(share: Share, lowest: float) -> Share:
    return max(share, lowest) if isinstance(share, float) else share
