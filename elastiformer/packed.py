"""One step's rows: the tokens of any mix of requests, side by side, each with its own plan.

Rows that a layer treats alike form a group, and a group is computed in one go. What the rows
spent is summed up at the end of a step, from the routes that were really taken.

Shape letters: N packed tokens   L layers   C columns of a priced plan
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from elastiformer.accounting import ModelShape
from elastiformer.capacity import Phase, Unit
from elastiformer.priced import Column, PricedPlan
from elastiformer.routers import TOKEN_UNITS
from elastiformer.sequence import Chunk
from elastiformer.usage import Usage

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides how a row is computed, beside its router's scores."""

    plan: PricedPlan
    phase: Phase

    @property
    def is_dense(self) -> bool:
        return self.plan.is_dense


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows of a batch, ascending; `index_R` is None when they are all of them."""

    index_R: Tensor | None
    count: int

    def of(self, x_N: Tensor) -> Tensor:
        return x_N if self.index_R is None else x_N[self.index_R]

    def put(self, into_N: Tensor, x_R: Tensor) -> None:
        if self.index_R is None:
            into_N.copy_(x_R)
        else:
            into_N[self.index_R] = x_R

    def add(self, into_N: Tensor, x_R: Tensor) -> Tensor:
        if self.index_R is None:
            return into_N + x_R
        return into_N.index_add(0, self.index_R, x_R)

    def where(self, kept_N: Tensor | None) -> Rows:
        """Those of these rows that are kept."""
        if kept_N is None:
            return self
        if self.index_R is None:
            (index_R,) = torch.nonzero(kept_N, as_tuple=True)
        else:
            index_R = self.index_R[kept_N[self.index_R]]
        return Rows(index_R, len(index_R))


class Packed:
    """The rows of one step."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks = chunks
        self.device = device
        self.spans: list[slice] = []
        self.positions: list[int] = []
        self.kinds: list[Kind] = []
        ids: list[int] = []
        for chunk in chunks:
            sequence, begin = chunk.sequence, len(ids)
            ids += chunk.ids
            self.spans.append(slice(begin, len(ids)))
            for position in range(sequence.length, sequence.length + len(chunk.ids)):
                self.positions.append(position)
                self.kinds.append(Kind(sequence.plan_at(position), sequence.phase_at(position)))
        self.count = len(ids)
        self.ids_N = torch.tensor(ids, dtype=torch.long, device=device)
        self.position_N = torch.tensor(self.positions, dtype=torch.long, device=device)
        self.rows_of_chunk = [
            Rows(torch.arange(span.start, span.stop, device=device), span.stop - span.start)
            for span in self.spans
        ]
        self._rows_of_kind: dict[Kind, list[int]] = {}
        for row, kind in enumerate(self.kinds):
            self._rows_of_kind.setdefault(kind, []).append(row)
        self._merged: dict[frozenset[Kind], Rows] = {}
        self.firsts = [row for row, position in enumerate(self.positions) if position == 0]

    @property
    def distinct_kinds(self) -> tuple[Kind, ...]:
        return tuple(self._rows_of_kind)

    def rows_of(self, kinds: frozenset[Kind]) -> Rows:
        if kinds not in self._merged:
            if len(kinds) == len(self._rows_of_kind):
                self._merged[kinds] = Rows(None, self.count)
            else:
                rows = sorted(row for kind in kinds for row in self._rows_of_kind[kind])
                self._merged[kinds] = Rows(torch.tensor(rows, device=self.device), len(rows))
        return self._merged[kinds]

    def groups(self, signature: Callable[[Kind], S]) -> Iterator[tuple[S, Rows]]:
        """The rows, by what `signature` says of their kind."""
        alike: dict[S, list[Kind]] = {}
        for kind in self._rows_of_kind:
            alike.setdefault(signature(kind), []).append(kind)
        for value, kinds in alike.items():
            yield value, self.rows_of(frozenset(kinds))

    def output_rows(self) -> list[list[int]]:
        """Per chunk, the rows whose logits are needed."""
        return [
            [row for row in range(span.start, span.stop) if self.kinds[row].phase is Phase.OUTPUT]
            for span in self.spans
        ]


class Taken:
    """The routes of one step, noted layer by layer, and settled into usages at its end."""

    def __init__(self, packed: Packed, shape: ModelShape) -> None:
        self._packed, self._shape = packed, shape
        self._attention: list[Tensor | None] = []
        self._mlp: list[Tensor | None] = []
        self._keys: list[list[int]] = []

    def attention(self, kept_N: Tensor | None, keys_of_chunk: list[int]) -> None:
        self._attention.append(kept_N)
        self._keys.append(keys_of_chunk)

    def mlp(self, kept_N: Tensor | None) -> None:
        self._mlp.append(kept_N)

    def settle(self, output_rows: list[list[int]], units: Sequence[Unit]) -> None:
        """Add to each sequence what its rows spent."""
        packed = self._packed
        number = {kind: at for at, kind in enumerate(packed.distinct_kinds)}
        columns_KLC = torch.stack([kind.plan.columns_LC for kind in number])
        cost_NLC = columns_KLC[torch.tensor([number[kind] for kind in packed.kinds])]
        attention_NL = _stacked(self._attention, packed.count)
        mlp_NL = _stacked(self._mlp, packed.count)
        lengths = torch.tensor([span.stop - span.start for span in packed.spans])
        keys_NL = torch.tensor(self._keys).T.repeat_interleave(lengths, 0)

        linear_N = torch.where(
            attention_NL,
            cost_NLC[..., Column.ATTENTION_KEPT],
            cost_NLC[..., Column.ATTENTION_SKIPPED],
        ).sum(1) + torch.where(
            mlp_NL, cost_NLC[..., Column.MLP_KEPT], cost_NLC[..., Column.MLP_SKIPPED]
        ).sum(1)
        scores_N = (attention_NL * keys_NL * cost_NLC[..., Column.ATTENTION_PER_KEY]).sum(1)
        dense_linear = self._shape.dense_token_flops(context=0)
        dense_per_key = self._shape.dense_token_flops(context=1) - dense_linear
        head = self._shape.head_flops
        for chunk, span, outputs in zip(packed.chunks, packed.spans, output_rows, strict=True):
            tokens = span.stop - span.start
            linear, scores = int(linear_N[span].sum()), int(scores_N[span].sum())
            keys = chunk.sequence.length + tokens
            dense_block = tokens * (dense_linear + keys * dense_per_key)
            heads = len(outputs) * head
            usage = Usage(
                flops=linear + scores + heads,
                dense_flops=dense_block + heads,
                block_flops=linear + scores,
                dense_block_flops=dense_block,
                parameters_used=(linear + heads) // 2,
                dense_parameters=(tokens * dense_linear + heads) // 2,
            )
            self._decisions(usage, span, attention_NL, mlp_NL, cost_NLC, units)
            chunk.sequence.usage += usage

    def _decisions(
        self,
        usage: Usage,
        span: slice,
        attention_NL: Tensor,
        mlp_NL: Tensor,
        cost_NLC: Tensor,
        units: Sequence[Unit],
    ) -> None:
        """What was decided for the rows of one chunk, phase by phase; dense rows decide nothing."""
        by_phase: dict[Phase, list[int]] = {}
        for row in range(span.start, span.stop):
            if not self._packed.kinds[row].is_dense:
                by_phase.setdefault(self._packed.kinds[row].phase, []).append(row)
        shape = self._shape.layers[0]
        channels = (
            shape.width + shape.attention_width,
            shape.width + shape.mlp_width,
        )
        for phase, rows in by_phase.items():
            attention, mlp, cost = attention_NL[rows], mlp_NL[rows], cost_NLC[rows]
            kept_attention, kept_mlp = int(attention.sum()), int(mlp.sum())
            for unit, kept in zip(TOKEN_UNITS, (kept_attention, kept_mlp), strict=True):
                usage.decide(unit, phase, attention.numel(), attention.numel() - kept)

            def left_out(column: Column, kept_NL: Tensor, cost: Tensor = cost) -> int:
                return int((cost[..., column] * kept_NL).sum())

            if Unit.HEADS in units:
                skipped = left_out(Column.HEADS_LEFT_OUT, attention)
                usage.decide(Unit.HEADS, phase, kept_attention * shape.heads, skipped)
            if Unit.EXPERTS in units:
                skipped = left_out(Column.EXPERTS_LEFT_OUT, mlp)
                usage.decide(Unit.EXPERTS, phase, kept_mlp * shape.experts, skipped)
            if Unit.CHANNELS in units:
                skipped = left_out(Column.ATTENTION_CHANNELS_LEFT_OUT, attention)
                skipped += left_out(Column.MLP_CHANNELS_LEFT_OUT, mlp)
                routed = kept_attention * channels[0] + kept_mlp * channels[1]
                usage.decide(Unit.CHANNELS, phase, routed, skipped)


def _stacked(kept: list[Tensor | None], count: int) -> Tensor:
    """Per layer which rows were kept, as bool [N, L] on the CPU."""
    everything = torch.ones(count, dtype=torch.bool)
    return torch.stack([everything if k is None else k.cpu() for k in kept], dim=1)
