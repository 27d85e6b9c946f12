"""The masked form: the base's own forward, with what is left out multiplied by zero.

Differentiable, and as dear as the dense model: for training and for measuring quality. It is made
of hooks on the base's modules, put there for one pass and taken away after it, so the base stays
what it was, and a pass in which every token is dense runs the base's own code and nothing else.

It knows nothing of the sparse form (sparse.py), which takes the same decisions and really skips;
a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastiformer.accounting import ModelShape, layer_counts, repaired_from
from elastiformer.adapter import Adapter
from elastiformer.capacity import (
    Phase,
    Site,
    Unit,
    is_dense,
    leaves_only_channels_out,
    rooted,
)
from elastiformer.families import Layer, Layout
from elastiformer.plan_grid import PlanGrid, Route, Selection
from elastiformer.routers import (
    TOKEN_UNITS,
    Debt,
    best,
    by_rank,
    by_threshold,
    part_gate,
    token_gate,
)
from elastiformer.thresholds import Grants, ladders, take

_COUNTS = ("heads", "experts", *(site.value for site in Site))


@dataclass(frozen=True, slots=True, eq=False)
class MaskedResult:
    logits_BTV: Tensor
    routes: list[Route]


def run_masked(
    base: nn.Module,
    layout: Layout,
    shape: ModelShape,
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    grid: PlanGrid,
    output_BT: Tensor,
    selection: Selection,
    mask_BT: Tensor | None = None,
) -> MaskedResult:
    """One forward over whole windows, each token under its own plan.

    Args:
        inputs: what the base's forward takes, beside the mask.
    """
    masked = MaskedPass(layout, shape, adapter, grid, output_BT, selection, mask_BT)
    with masked.hooked():
        logits_BTV = base(**inputs, attention_mask=mask_BT, use_cache=False).logits
    return MaskedResult(logits_BTV, masked.routes)


class MaskedPass:
    """The hooks of one pass, and the routes that it took."""

    def __init__(
        self,
        layout: Layout,
        shape: ModelShape,
        adapter: Adapter,
        grid: PlanGrid,
        output_BT: Tensor,
        selection: Selection,
        mask_BT: Tensor | None,
    ) -> None:
        self.layout, self.adapter, self.grid = layout, adapter, grid
        self.output_BT, self.selection, self.mask_BT = output_BT, selection, mask_BT
        self.routes: list[Route] = []
        device = output_BT.device
        dense_P = torch.tensor([is_dense(plan) for plan in grid.plans], device=device)
        self.dense_BT = dense_P[grid.plan_BT]
        if mask_BT is not None:
            self.dense_BT = self.dense_BT | ~mask_BT.bool()
        self.all_dense = bool(self.dense_BT.all())
        shares = [
            [[getattr(layer, unit.value) for unit in TOKEN_UNITS] for layer in plan]
            for plan in grid.plans
        ]
        counts = [
            [
                [getattr(layer_counts(at, layer), name) for name in _COUNTS]
                for at, layer in zip(shape.layers, plan, strict=True)
            ]
            for plan in grid.plans
        ]
        # In float64, as Python has them: a debt summed up otherwise would decide otherwise.
        self._shares_PLU = torch.tensor(shares, dtype=torch.float64, device=device)
        self._counts_PLC = torch.tensor(counts, device=device)
        self._gates: dict[tuple[int, Unit], Tensor] = {}
        self._picked: dict[tuple[int, Site], Tensor | None] = {}
        first_BT = torch.zeros_like(output_BT)
        first_BT[:, 0] = True
        self._first_BT = first_BT
        # Position 0 skips no sub-layer, so its repair may begin later.
        starts = [[repaired_from(each) for each in (plan, rooted(plan))] for plan in grid.plans]
        starts_P2 = torch.tensor(starts, device=device)
        self._repaired_from_BT = starts_P2[grid.plan_BT, first_BT.long()]
        calibration = adapter.calibration if layout.causal else None
        self._ladder_LTG = None if calibration is None else ladders(calibration.channel_quantiles)
        takes_P = torch.tensor([leaves_only_channels_out(plan) for plan in grid.plans])
        takes_BT = takes_P[grid.plan_BT.cpu()] & output_BT.cpu() & ~first_BT.cpu()
        self._takes_BT = takes_BT  # on the host, where thresholds are

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            if not self.all_dense:
                for layer in self.layout.layers:
                    handles += self._hook(layer)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Layer) -> Iterator[RemovableHandle]:
        def before(module: nn.Module, hook: Callable[..., Any], **options: bool) -> RemovableHandle:
            return module.register_forward_pre_hook(
                lambda _, *given: hook(layer, *given), **options
            )

        def after(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
            return module.register_forward_hook(lambda _, args, out: hook(layer, args, out))

        yield before(layer.attention, self._before_attention, with_kwargs=True)
        yield before(layer.mlp, self._before_mlp)
        for site, hook in (
            (Site.ATTENTION_IN, self._before_queries),
            (Site.ATTENTION_OUT, self._before_out),
            (Site.MLP_IN, self._before_front),
            (Site.MLP_OUT, self._before_down),
        ):
            for module in {projection.module for projection in layer.at_site(site)}:
                yield before(module, hook)
        if self.adapter.lora is not None:
            for path, held in layer.modules.items():
                if self.adapter.lora.repairs(layer.index, path):
                    yield held[0].module.register_forward_hook(self._lora_hook(layer, path))
        # Last, since a branch may be what a repaired module gives.
        yield after(layer.attention_branch, self._after_attention)
        yield after(layer.mlp_branch, self._after_mlp)

    # The units, in the order in which a layer meets them.

    def _before_attention(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kept_BT = self._decide_tokens(layer, Unit.ATTENTION_TOKENS, x_BTD)
        self._decide_parts(layer, Unit.HEADS, layer.shape.heads, x_BTD)
        if self.adapter.spec.kv == "kept" and not bool(kept_BT.all()):
            place = 1 if len(args) > 1 else None  # some layers hand it on by its place
            given = kwargs.get("attention_mask") if place is None else args[place]
            mask = self._only_kept_keys(layer, kept_BT, given, x_BTD)
            if place is None:
                return args, kwargs | {"attention_mask": mask}
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, kwargs

    def _before_queries(self, layer: Layer, args: tuple[Tensor]) -> tuple[Tensor]:
        return (self._pick(layer, Site.ATTENTION_IN, args[0]),)

    def _before_out(self, layer: Layer, args: tuple[Tensor]) -> tuple[Tensor]:
        o_BTA = args[0]
        gate_BTM = self._gates.pop((layer.index, Unit.HEADS), None)
        if gate_BTM is not None:
            o_BTA = o_BTA * gate_BTM.repeat_interleave(layer.shape.head_dim, -1).to(o_BTA.dtype)
        return (self._pick(layer, Site.ATTENTION_OUT, o_BTA),)

    def _after_attention(self, layer: Layer, args: object, out: Any) -> Any:
        return self._gated(layer, Unit.ATTENTION_TOKENS, out)

    def _before_mlp(self, layer: Layer, args: tuple[Tensor]) -> None:
        self._decide_tokens(layer, Unit.MLP_TOKENS, args[0])
        self._decide_parts(layer, Unit.EXPERTS, self.adapter.spec.experts, args[0])

    def _before_front(self, layer: Layer, args: tuple[Tensor]) -> tuple[Tensor]:
        return (self._pick(layer, Site.MLP_IN, args[0]),)

    def _before_down(self, layer: Layer, args: tuple[Tensor]) -> tuple[Tensor]:
        a_BTI = args[0]
        gate_BTM = self._gates.pop((layer.index, Unit.EXPERTS), None)
        if gate_BTM is not None:
            expert_I = self.adapter.expert_of_neuron(layer.index)
            a_BTI = a_BTI * gate_BTM[..., expert_I].to(a_BTI.dtype)
        return (self._pick(layer, Site.MLP_OUT, a_BTI),)

    def _after_mlp(self, layer: Layer, args: object, out: Any) -> Any:
        return self._gated(layer, Unit.MLP_TOKENS, out)

    def _lora_hook(self, layer: Layer, path: str) -> Callable[..., Tensor]:
        lora = self.adapter.lora
        assert lora is not None

        def hook(_: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            for phase in Phase:
                in_phase_BT = self.output_BT == (phase is Phase.OUTPUT)
                rows_BT = in_phase_BT & ~self.dense_BT & (self._repaired_from_BT <= layer.index)
                pair = lora.pair(layer.index, path, phase)
                if pair is not None and bool(rows_BT.any()):
                    added = pair(args[0].to(pair.a_RI.dtype)).to(out.dtype)
                    out = out + added * rows_BT[..., None].to(out.dtype)
            return out

        return hook

    # What a unit decides.

    def _decide_tokens(self, layer: Layer, unit: Unit, x_BTD: Tensor) -> Tensor:
        """Which tokens keep this sub-layer; leaves their gate for the hook after it."""
        at = TOKEN_UNITS.index(unit)
        share_BT = self._shares_PLU[:, layer.index, at][self.grid.plan_BT]
        share_BT = torch.where(self.dense_BT | self._first_BT, 1.0, share_BT)
        kept_BT = share_BT > 0
        active_BT = kept_BT & (share_BT < 1)
        gate_BT = kept_BT.float()
        if bool(active_BT.any()):
            router = self.adapter.router(layer.index, unit)
            scores_BT = None if router is None else router(x_BTD).squeeze(-1)
            if self.selection is Selection.RANK and scores_BT is not None:
                chosen_BT = torch.zeros_like(active_BT)
                for phase_BT in (self.output_BT, ~self.output_BT):
                    among_BT = active_BT & phase_BT
                    chosen_BT |= by_rank(scores_BT.detach(), share_BT, among_BT)
            else:
                chosen_BT = self._by_threshold(layer, unit, scores_BT, share_BT, active_BT)
            kept_BT = torch.where(active_BT, chosen_BT, kept_BT)
            gate_BT = kept_BT.float()
            if scores_BT is not None:
                routed_BT = token_gate(scores_BT, kept_BT, self.adapter.spec.token_gate)
                gate_BT = torch.where(active_BT, routed_BT, gate_BT)
                self.routes.append(Route(layer.index, unit, scores_BT, kept_BT, active_BT))
        self._gates[layer.index, unit] = gate_BT
        return kept_BT

    def _by_threshold(
        self,
        layer: Layer,
        unit: Unit,
        scores_BT: Tensor | None,
        share_BT: Tensor,
        active_BT: Tensor,
    ) -> Tensor:
        chosen_BT = torch.zeros_like(active_BT)
        for row in range(len(share_BT)):
            for phase in Phase:
                in_phase_T = self.output_BT[row] == (phase is Phase.OUTPUT)
                (where_N,) = torch.nonzero(active_BT[row] & in_phase_T, as_tuple=True)
                shares = share_BT[row, where_N].tolist()
                kept = by_threshold(
                    None if scores_BT is None else scores_BT[row, where_N].tolist(),
                    shares,
                    [self.adapter.threshold(unit, layer.index, phase, s) for s in shares],
                    Debt(),
                )
                chosen_BT[row, where_N] = torch.tensor(
                    kept, dtype=torch.bool, device=chosen_BT.device
                )
        return chosen_BT

    def _decide_parts(self, layer: Layer, unit: Unit, parts: int, x_BTD: Tensor) -> None:
        """Which heads or experts each token keeps; leaves their gates for the hook after."""
        count_BT = self._count(layer, unit.value)
        # No experts kept means: this layer's MLP is not divided for this token.
        active_BT = ~self.dense_BT & (count_BT > 0) & (count_BT < parts)
        if not bool(active_BT.any()):
            return
        router = self.adapter.router(layer.index, unit)
        assert router is not None, f"a plan that routes {unit} without its routers"
        scores_BTM = router(x_BTD)
        count_BT = torch.where(active_BT, count_BT, parts)
        kept_BTM = best(scores_BTM.detach(), count_BT)
        gate_BTM = part_gate(scores_BTM, kept_BTM, self.adapter.spec.part_gate)
        self._gates[layer.index, unit] = torch.where(
            active_BT[..., None], gate_BTM, torch.ones_like(gate_BTM)
        )
        self.routes.append(Route(layer.index, unit, scores_BTM, kept_BTM, active_BT))

    def _pick(self, layer: Layer, site: Site, x_BTI: Tensor) -> Tensor:
        """`x`, zero but for each token's channels of the largest size x column norm."""
        whole = {
            Site.ATTENTION_OUT: layer.shape.attention_width,
            Site.MLP_OUT: layer.shape.mlp_width,
        }.get(site, layer.shape.width)
        key = (layer.index, site)
        if key not in self._picked:  # query, key and value read the same channels: pick once
            count_BT = torch.where(self.dense_BT, whole, self._count(layer, site.value))
            if bool((count_BT < whole).any()):
                self._picked[key] = self._picked_of(layer, site, x_BTI.detach().float(), count_BT)
            else:
                self._picked[key] = None
        kept_BTI = self._picked[key]
        return x_BTI if kept_BTI is None else x_BTI * kept_BTI

    def _picked_of(self, layer: Layer, site: Site, x_BTI: Tensor, count_BT: Tensor) -> Tensor:
        """True for the channels that are picked: as many as granted, or those above a threshold."""
        norms_I = self.layout.column_norms(layer, site)
        weighed_BTI = x_BTI.abs() * norms_I
        if self._ladder_LTG is None or not bool(self._takes_BT.any()):
            return best(weighed_BTI, count_BT)
        # Row after row, so that those of one request follow each other.
        owner_BT = torch.where(self._takes_BT, torch.arange(len(x_BTI))[:, None], -1)
        at_N, nothing_N = np.arange(owner_BT.numel()), np.zeros(owner_BT.numel(), dtype=np.int64)
        place = (layer.index, tuple(Site).index(site))
        grants = Grants(
            self._ladder_LTG[place][None, None],
            count_BT.cpu().view(1, 1, -1).numpy(),
            at_N,
            owner_BT.flatten().numpy(),
            np.zeros((1, 1, len(x_BTI)), dtype=np.int64),
            *(nothing_N, nothing_N),
        )
        x_NI = x_BTI.flatten(0, 1).cpu().numpy()
        _, least_N = take(x_NI, norms_I.cpu().numpy(), grants, 0, 0, at_N, 0)
        least_BT = torch.from_numpy(least_N).to(x_BTI.device).view(count_BT.shape)
        searched_BT = least_BT < 0
        kept_BTI = best(weighed_BTI, torch.where(searched_BT, count_BT, weighed_BTI.shape[-1]))
        return kept_BTI & (searched_BT[..., None] | ~(weighed_BTI < least_BT[..., None]))

    def _count(self, layer: Layer, name: str) -> Tensor:
        return self._counts_PLC[:, layer.index, _COUNTS.index(name)][self.grid.plan_BT]

    def _gated(self, layer: Layer, unit: Unit, out: Any) -> Any:
        gate_BT = self._gates.pop((layer.index, unit))
        if isinstance(out, tuple):
            return (out[0] * gate_BT[..., None].to(out[0].dtype), *out[1:])
        return out * gate_BT[..., None].to(out.dtype)

    def _only_kept_keys(
        self, layer: Layer, kept_BT: Tensor, given: Tensor | None, x_BTD: Tensor
    ) -> Tensor:
        """The attention mask without the tokens that this layer's attention skipped.

        A skipped token may see itself, so that no row of the mask is empty; its output is
        multiplied by zero.
        """
        tokens = kept_BT.shape[1]
        at_T = torch.arange(tokens, device=kept_BT.device)
        back_TT = at_T[:, None] - at_T[None, :]
        seen_TT = back_TT >= 0
        if not self.layout.causal:
            seen_TT, back_TT = torch.ones_like(seen_TT), back_TT.abs()
        if layer.window is not None:
            seen_TT &= back_TT < layer.window
        seen_BTT = seen_TT & (kept_BT[:, None, :] | (back_TT == 0))
        if self.mask_BT is not None:
            seen_BTT = seen_BTT & (self.mask_BT.bool()[:, None, :] | (back_TT == 0))
        seen_B1TT = seen_BTT[:, None]
        if given is None or given.dtype == torch.bool:
            return seen_B1TT
        lowest = torch.finfo(x_BTD.dtype).min
        return torch.zeros_like(seen_B1TT, dtype=x_BTD.dtype).masked_fill(~seen_B1TT, lowest)
