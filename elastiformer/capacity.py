"""What a request asks to pay, and the plan that makes it concrete. Pure Python: no torch.

A *capacity* is a wish: a fraction of the dense FLOPs of the transformer blocks, or a keep share
per unit, for each of the two phases. A *plan* is that wish made concrete for one token: what
each layer keeps. How a number becomes a plan is calibration.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from elastiformer.errors import CapacityError


class Unit(StrEnum):
    """A kind of thing that can be left out."""

    ATTENTION_TOKENS = "attention_tokens"
    MLP_TOKENS = "mlp_tokens"
    HEADS = "heads"
    EXPERTS = "experts"
    CHANNELS = "channels"
    IMAGE_TOKENS = "image_tokens"


class Phase(StrEnum):
    """Why a token is computed: only for its keys and values, or for its logits."""

    PROMPT = "prompt"
    OUTPUT = "output"


class Site(StrEnum):
    """Where input channels are picked: the input of one group of projections."""

    ATTENTION_IN = "attention_in"  # query, key and value read the same channels
    ATTENTION_OUT = "attention_out"
    MLP_IN = "mlp_in"  # gate and up read the same channels
    MLP_OUT = "mlp_out"  # the neurons


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The keep share of each unit in one layer, in [0, 1]; all 1 is the pretrained layer.

    A share of 0 is meaningful for the token units only: the whole sub-layer is left out.
    Of heads, experts and channels at least one is kept.
    """

    attention_tokens: float = 1.0
    mlp_tokens: float = 1.0
    heads: float = 1.0
    experts: float = 1.0
    attention_in: float = 1.0
    attention_out: float = 1.0
    mlp_in: float = 1.0
    mlp_out: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            share = getattr(self, field.name)
            if not 0 <= share <= 1:
                raise CapacityError(f"{field.name}: a keep share is in [0, 1]; got {share}")

    def kept(self, name: str, of: int) -> int:
        """How many of `of` things the share `name` keeps: rounded, and at least one."""
        share: float = getattr(self, name)
        return max(1, round(share * of))


WHOLE_LAYER = LayerPlan()

Plan = tuple[LayerPlan, ...]  # one per layer: what one token of one phase runs under


def dense_plan(layers: int) -> Plan:
    return (WHOLE_LAYER,) * layers


def is_dense(plan: Plan) -> bool:
    return all(layer == WHOLE_LAYER for layer in plan)


def leaves_only_channels_out(plan: Plan) -> bool:
    return all(
        layer.attention_tokens == layer.mlp_tokens == layer.heads == layer.experts == 1
        for layer in plan
    )


def rooted(plan: Plan) -> Plan:
    """The plan as position 0 runs it: every token attends to it, so it skips no sub-layer."""
    return tuple(replace(layer, attention_tokens=1.0, mlp_tokens=1.0) for layer in plan)


@dataclass(frozen=True, slots=True)
class UnitShares:
    """A keep share per unit, the same in every layer; what is not named is kept whole.

    Image tokens are dropped before the first layer, so no layer's plan knows their share.
    """

    attention_tokens: float = 1.0
    mlp_tokens: float = 1.0
    heads: float = 1.0
    experts: float = 1.0
    channels: float = 1.0
    image_tokens: float = 1.0

    @property
    def is_dense(self) -> bool:
        return all(getattr(self, field.name) == 1.0 for field in fields(self))

    @property
    def named(self) -> dict[str, float]:
        """The shares below 1, by unit."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) < 1.0
        }

    def layer_plan(self) -> LayerPlan:
        return LayerPlan(
            attention_tokens=self.attention_tokens,
            mlp_tokens=self.mlp_tokens,
            heads=self.heads,
            experts=self.experts,
            **{site.value: self.channels for site in Site},
        )


Share = float | UnitShares  # of the dense FLOPs, or of each unit


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a request asks to pay, per phase. At 1.0 no router runs at all."""

    prompt: Share = 1.0
    output: Share = 1.0

    @classmethod
    def parse(cls, value: object, name: str = "capacity") -> Capacity:
        """Read the JSON forms of a capacity.

        A number in (0, 1]; `{unit: share}`; or `{"prompt": …, "output": …}`, each a number or
        `{unit: share}`. A plain number or `{unit: share}` holds for both phases.

        Raises:
            CapacityError: naming the field, the value and the bound.
        """
        if isinstance(value, Mapping):
            phases = {phase.value for phase in Phase}
            if phases & set(value):
                if stray := sorted(map(str, set(value) - phases)):
                    raise CapacityError(
                        f"{name}: beside 'prompt' and 'output' nothing else may stand; "
                        f"got {', '.join(stray)}"
                    )
                return cls(
                    **{
                        phase: _parse_share(share, f"{name}.{phase}")
                        for phase, share in value.items()
                    }
                )
        share = _parse_share(value, name)
        return cls(share, share)

    @property
    def is_dense(self) -> bool:
        return _share_is_dense(self.prompt) and _share_is_dense(self.output)

    def of(self, phase: Phase) -> Share:
        return self.prompt if phase is Phase.PROMPT else self.output

    def limited(self, ceiling: float) -> Capacity:
        """This capacity, no share of the dense FLOPs above `ceiling`.

        Shares per unit that would cost more than the ceiling cannot be compared with it before a
        plan is made, so a ceiling below 1 replaces them.
        """
        if ceiling >= 1.0:
            return self
        return replace(
            self, prompt=_limit(self.prompt, ceiling), output=_limit(self.output, ceiling)
        )

    def as_json(self) -> object:
        """The shortest JSON form that parses back to this capacity."""
        prompt, output = _share_as_json(self.prompt), _share_as_json(self.output)
        return prompt if prompt == output else {"prompt": prompt, "output": output}


DENSE = Capacity()


def _parse_share(value: object, name: str) -> Share:
    if isinstance(value, Mapping):
        return _parse_units(value, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CapacityError(
            f"{name}: a number above 0 and at most 1, or an object of keep shares; got {value!r}"
        )
    if not 0 < value <= 1:  # also refuses NaN
        raise CapacityError(
            f"{name}: a fraction of the dense compute, above 0 and at most 1; got {value}"
        )
    return float(value)


def _parse_units(value: Mapping[object, object], name: str) -> UnitShares:
    known = [field.name for field in fields(UnitShares)]
    if not value:
        raise CapacityError(f"{name}: an empty object names no unit; known: {', '.join(known)}")
    shares: dict[str, float] = {}
    for unit, share in value.items():
        if unit not in known:
            raise CapacityError(f"{name}: unknown unit {unit!r}; known: {', '.join(known)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or math.isnan(share):
            raise CapacityError(f"{name}.{unit}: a keep share is a number; got {share!r}")
        if not 0 < share <= 1:
            raise CapacityError(
                f"{name}.{unit}: a keep share is above 0 and at most 1; got {share}"
            )
        shares[str(unit)] = float(share)
    return UnitShares(**shares)


def _share_is_dense(share: Share) -> bool:
    return share.is_dense if isinstance(share, UnitShares) else share == 1.0


def _limit(share: Share, ceiling: float) -> float:
    return ceiling if isinstance(share, UnitShares) else min(share, ceiling)


def _share_as_json(share: Share) -> object:
    if isinstance(share, UnitShares):
        return share.named or 1.0
    return share
