"""How large channels are in held-out text: the quantiles that thresholds are read from.

Shape letters: W windows   T tokens   I inputs
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from elastiformer import Calibration, ElasticModel, Phase
from elastiformer.calibration import QUANTILES, Quantiles
from elastiformer.capacity import Site
from elastiformer.families import Layer
from training.picking import watching_inputs

_DIGITS = 5  # that are written down


@torch.inference_mode()
def channel_quantiles(model: ElasticModel, draft: Calibration, ids_WT: Tensor) -> Quantiles:
    """Quantiles of size x column norm at every layer and site, of tokens after position 0.

    Of windows of which every token is scored, in the middle of the calibrated range: sizes shift
    a little with the capacity, and a request's debts make up for that. None where outputs leave
    out no channels.
    """
    if not any(step.field in set(Site) for step in draft.paths[Phase.OUTPUT]):
        return ()
    middle = (1 + draft.lowest) / 2
    plan = draft.schedule(middle, Phase.OUTPUT, model.shape, draft.context).nearest
    found: dict[tuple[int, Site], tuple[float, ...]] = {}

    def watch(layer: Layer, site: Site, x_WTI: Tensor) -> None:
        sizes_WTI = x_WTI[:, 1:].abs().float() * model.layout.column_norms(layer, site)
        values = np.quantile(sizes_WTI.cpu().numpy(), np.linspace(0, 1, QUANTILES))
        found[layer.index, site] = tuple(float(f"{value:.{_DIGITS}g}") for value in values)

    with watching_inputs(model, watch):
        output_WT = torch.ones_like(ids_WT, dtype=torch.bool, device=model.device)
        model.masked(ids_WT.to(model.device), [(plan, plan)] * len(ids_WT), output_WT)
    layers = range(len(model.layout.layers))
    return tuple(tuple(found[layer, site] for site in Site) for layer in layers)
