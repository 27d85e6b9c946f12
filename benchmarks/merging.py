"""Other ways to save on an image's tokens: alike ones are merged, or random ones dropped.

A plain vision transformer whose every layer shrinks the sequence between attention and MLP. As in
what is served, only what the head reads is computed in the last layer, but for all keys and values.

Source: ToMe, bipartite soft matching (arXiv:2210.09461).

Shape letters: B images   T tokens, class token first   D width   H heads   K a head's width
    C channels   O outputs
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.encoder_families import Reads
from elastiformer.encoders import EncoderLayout
from elastiformer.encoding import headed
from elastiformer.errors import UnsupportedModel
from elastiformer.families import Layer, Projection

# (tokens [B, T, D], the keys' mean over heads [B, T, K], sizes [B, T, 1], how many tokens less)
# -> the tokens that are left, and their sizes: how many patches each stands for.
Shrink = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def merge_alike(
    x_BTD: Tensor, key_BTK: Tensor, size_BT1: Tensor, less: int
) -> tuple[Tensor, Tensor]:
    """Every other token offers itself to the likest of the rest; the `less` best pairs merge.

    A merged token is the mean of its patches. The class token, the first, never offers itself.
    """
    metric_BTK = F.normalize(key_BTK.float(), dim=-1)
    even_BAK, odd_BEK = metric_BTK[:, ::2], metric_BTK[:, 1::2]
    alike_BAE = even_BAK @ odd_BEK.transpose(1, 2)
    alike_BAE[:, 0] = -torch.inf
    best_BA, partner_BA = alike_BAE.max(-1)
    order_BA = best_BA.argsort(-1, descending=True)
    going_BR = order_BA[:, :less]
    staying_BS = order_BA[:, less:].sort(-1).values
    into_BR = partner_BA.gather(1, going_BR)

    def merged(each_BTD: Tensor) -> Tensor:
        even_BAD, odd_BED = each_BTD[:, ::2], each_BTD[:, 1::2]
        going_BRD = _rows(even_BAD, going_BR)
        index_BRD = into_BR[..., None].expand(going_BRD.shape)
        return torch.cat(
            [_rows(even_BAD, staying_BS), odd_BED.scatter_add(1, index_BRD, going_BRD)], 1
        )

    sum_BTD, size_BT1 = merged(x_BTD * size_BT1), merged(size_BT1)
    return sum_BTD / size_BT1, size_BT1


def drop_random(draw: torch.Generator) -> Shrink:
    """So many tokens less, whichever; the class token stays."""

    def drop(x_BTD: Tensor, key_BTK: Tensor, size_BT1: Tensor, less: int) -> tuple[Tensor, Tensor]:
        images, tokens, _ = x_BTD.shape
        chance_BT = torch.rand(images, tokens, generator=draw).to(x_BTD.device)
        chance_BT[:, 0] = -1.0
        kept_BS = chance_BT.argsort(-1)[:, : tokens - less].sort(-1).values
        return _rows(x_BTD, kept_BS), _rows(size_BT1, kept_BS)

    return drop


class ShrinkingEncoder:
    """An image classifier whose layers each leave fewer tokens to the next."""

    def __init__(self, encoder: EncoderLayout) -> None:
        """Raises UnsupportedModel: no vision transformer that norms before its sub-layers."""
        first = encoder.layers.layers[0]
        unusual = (first.attention_close, first.after_attention, first.after_mlp, first.gate)
        read = (encoder.reads_images, encoder.reads, encoder.class_tokens)
        if read != (True, Reads.CLASS, 1) or any(each is not None for each in unusual):
            raise UnsupportedModel(
                f"{type(encoder.outer).__name__}: tokens are merged in vision transformers that "
                "read one class token"
            )
        self._encoder = encoder

    @torch.inference_mode()
    def logits(
        self, pixels_BCHW: Tensor, shrink: Shrink, less: int, at_once: bool = False
    ) -> Tensor:
        """The head's outputs, [B, O].

        Args:
            less: tokens fewer after each layer's attention, as long as a pair is left.
            at_once: all of them before the first layer instead.
        """
        layers = self._encoder.layers.layers
        x_BTD = self._encoder.embeddings(pixels_BCHW)
        size_BT1 = x_BTD.new_ones(*x_BTD.shape[:2], 1)
        if at_once:
            x_BTD, size_BT1 = shrink(x_BTD, x_BTD, size_BT1, less)
        for layer in layers[:-1]:
            branch_BTD, key_BTK = _attention(layer, x_BTD, size_BT1, x_BTD.shape[1])
            x_BTD = x_BTD + branch_BTD
            now = 0 if at_once else min(less, (x_BTD.shape[1] - 1) // 2)
            if now:
                x_BTD, size_BT1 = shrink(x_BTD, key_BTK, size_BT1, now)
            x_BTD = x_BTD + _mlp(layer, x_BTD)
        read = self._encoder.class_tokens
        branch_BTD, _ = _attention(layers[-1], x_BTD, size_BT1, read)
        x_BTD = x_BTD[:, :read] + branch_BTD
        x_BTD = x_BTD + _mlp(layers[-1], x_BTD)
        return headed(self._encoder, self._encoder.layers.final_norm(x_BTD)).float()


def _attention(
    layer: Layer, x_BTD: Tensor, size_BT1: Tensor, queries: int
) -> tuple[Tensor, Tensor]:
    """The branch of the first `queries` tokens, and the keys' mean over heads.

    Attention is proportional: a token counts as often as it holds patches.
    """
    normed_BTD = layer.attention_norm(x_BTD)

    def heads(projection: Projection, of_BTD: Tensor) -> Tensor:
        flat = F.linear(of_BTD, projection.weight_OI, projection.bias_O)
        return flat.view(*flat.shape[:2], layer.shape.heads, -1).transpose(1, 2)

    key_BHTK = heads(layer.key, normed_BTD)
    mixed_BHTK = F.scaled_dot_product_attention(
        heads(layer.query, normed_BTD[:, :queries]),
        key_BHTK,
        heads(layer.value, normed_BTD),
        attn_mask=size_BT1.log().transpose(1, 2)[:, None],
        scale=layer.scale,
    )
    mixed_BTD = mixed_BHTK.transpose(1, 2).flatten(2)
    return F.linear(mixed_BTD, layer.out.weight_OI, layer.out.bias_O), key_BHTK.mean(1)


def _mlp(layer: Layer, x_BTD: Tensor) -> Tensor:
    up_BTI = F.linear(layer.mlp_norm(x_BTD), layer.up.weight_OI, layer.up.bias_O)
    return F.linear(layer.activation(up_BTI), layer.down.weight_OI, layer.down.bias_O)


def _rows(each_BTD: Tensor, index_BS: Tensor) -> Tensor:
    return each_BTD.gather(1, index_BS[..., None].expand(-1, -1, each_BTD.shape[-1]))
