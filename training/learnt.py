"""What a little training text says of channels: what to weigh them by, what to put in their place.

Position 0 is left out of all sums: it is like no other token.

Shape letters: W windows   B rows   T tokens   R tokens after position 0   V vocabulary
    I inputs or neurons
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from elastiformer import ElasticModel
from elastiformer.capacity import Site
from elastiformer.families import Layer
from training.channel_choices import Choice, ChoicePicking
from training.picking import Sizes, Under, run_picked
from training.progress import track


def gradients(model: ElasticModel, ids_WT: Tensor, seed: int) -> Sizes:
    """The root mean square, over tokens, of the gradient at each input of each site.

    Of the log-probability of tokens that the model itself draws: one backward pass a window.
    """
    squares: dict[tuple[int, Site], Tensor] = {}

    def watch(place: tuple[int, Site]) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(gradient_BTI: Tensor) -> None:
            squares[place] = gradient_BTI[:, 1:].float().square().sum((0, 1)) + squares.get(
                place, 0
            )

        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            args[0].register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    generator = torch.Generator(device=model.device).manual_seed(seed)
    with ExitStack() as hooks, torch.enable_grad():
        embedded = model.layout.embedding.register_forward_hook(
            lambda _, args, out: out.detach().requires_grad_()
        )
        hooks.callback(embedded.remove)
        for layer in model.layout.layers:
            for site in Site:
                module = layer.at_site(site)[0].module
                hook = watch((layer.index, site))
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        for ids_T in track(list(ids_WT.to(model.device)), label="gradients"):
            log_p_TV = model.teacher(ids_T[None])[0].float().log_softmax(-1)
            drawn_T1 = torch.multinomial(log_p_TV.detach().exp(), 1, generator=generator)
            log_p_TV.gather(-1, drawn_T1).sum().backward()  # type: ignore[no-untyped-call]
    tokens = ids_WT[:, 1:].numel()
    return {place: (square_I / tokens).sqrt() for place, square_I in squares.items()}


@torch.inference_mode()
def up_sizes(model: ElasticModel, ids_WT: Tensor) -> dict[int, Tensor]:
    """The root mean square, over tokens, of what up gives for each neuron, by layer."""
    squares: dict[int, Tensor] = {}

    def watch(layer: Layer) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            y_BRI = out[:, 1:, layer.up.start : layer.up.stop].float()
            squares[layer.index] = y_BRI.square().sum((0, 1)) + squares.get(layer.index, 0)

        return hook

    with ExitStack() as hooks:
        for layer in model.layout.layers:
            hooks.callback(layer.up.module.register_forward_hook(watch(layer)).remove)
        for ids_T in track(list(ids_WT.to(model.device)), label="sizes of up"):
            model.teacher(ids_T[None])
    tokens = ids_WT[:, 1:].numel()
    return {layer: (square_I / tokens).sqrt() for layer, square_I in squares.items()}


def constants(
    model: ElasticModel, choice: Choice, texts: Sequence[tuple[Tensor, Under]], rounds: int
) -> Sizes:
    """The means of what is left out on these texts, [1, T] each, fitted to themselves in rounds."""
    means: Sizes = {}
    for _ in range(rounds):
        picking = ChoicePicking(model, choice, constants=means)
        for ids_BT, under in texts:
            run_picked(model, ids_BT, under, picking)
        means = picking.left_out_means()
    return means
