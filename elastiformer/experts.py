"""From a dense MLP to experts, without loss: which neurons stand together.

An MLP is a sum over its neurons, so any division of them into equal blocks gives the MLP back
when all blocks are kept. Blocks of neurons that fire together are worth far more to a router than
blocks of neighbours: a token then needs few of them. (MoEfication, arXiv:2110.01786, finds them by
the weights; here it is co-activation on a little data.)

Shape letters: N tokens   I neurons   M experts   F features
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer.capacity import Site
from elastiformer.families import Layout

_FEATURES = 256
_ROUNDS = 12


@torch.inference_mode()
def coactivation_order(run: Callable[[], object], layout: Layout, experts: int) -> list[Tensor]:
    """Per layer, the neurons sorted by expert, int64 [mlp width]; deterministic.

    Args:
        run: runs the base on a little data; its activations say which neurons fire together.
    """
    seen: dict[int, Tensor] = {}
    handles = []
    for layer in layout.layers:

        def note(_: nn.Module, args: tuple[Tensor, ...], index: int = layer.index) -> None:
            seen[index] = args[0].detach().float().flatten(0, -2)

        handles.append(layer.down.module.register_forward_pre_hook(note))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [
        balanced_clusters(
            _features(seen[layer.index], layout.column_norms(layer, Site.MLP_OUT)), experts
        )
        for layer in layout.layers
    ]


def _features(a_NI: Tensor, norms_I: Tensor) -> Tensor:
    """One row per neuron: how much it adds to which token, of unit length."""
    strength_NI = a_NI.abs() * norms_I
    # What matters is which tokens a neuron is strong for, beside the token's own strength.
    strength_NI = F.normalize(strength_NI, dim=1, eps=1e-9)
    features_IN = strength_NI.T
    if features_IN.shape[1] > _FEATURES:
        mixer = torch.Generator().manual_seed(0)
        mix_NF = torch.randn(features_IN.shape[1], _FEATURES, generator=mixer)
        features_IN = features_IN @ mix_NF.to(features_IN.device) / _FEATURES**0.5
    return F.normalize(features_IN, dim=1, eps=1e-9)


def balanced_clusters(features_IF: Tensor, experts: int) -> Tensor:
    """K-means with equal sizes: the rows sorted by cluster, int64 [rows].

    Each round gives places to the pairs of row and centre that fit best, first come first served.
    """
    rows = len(features_IF)
    assert rows % experts == 0, f"{rows} neurons cannot be divided into {experts} equal experts"
    size = rows // experts
    start = torch.Generator().manual_seed(0)
    centres_MF = features_IF[torch.randperm(rows, generator=start)[:experts]]
    cluster_I = torch.zeros(rows, dtype=torch.long)
    for _ in range(_ROUNDS):
        fit_IM = (features_IF @ centres_MF.T).cpu()
        previous_I = cluster_I
        cluster_I = _assign(fit_IM, size)
        if torch.equal(cluster_I, previous_I):
            break
        centres_MF = torch.stack(
            [features_IF[cluster_I == expert].mean(0) for expert in range(experts)]
        )
    return cluster_I.argsort(stable=True).to(features_IF.device)


def _assign(fit_IM: Tensor, size: int) -> Tensor:
    """Each row's cluster, no cluster above `size`: rows with the most to lose choose first."""
    rows, experts = fit_IM.shape
    best_two = fit_IM.topk(min(2, experts), dim=1).values
    regret_I = best_two[:, 0] - best_two[:, -1]
    wishes = fit_IM.argsort(dim=1, descending=True).tolist()
    room = [size] * experts
    cluster = [0] * rows
    for row in regret_I.argsort(descending=True).tolist():
        for wish in wishes[row]:
            if room[wish]:
                room[wish] -= 1
                cluster[row] = wish
                break
    return torch.tensor(cluster)
