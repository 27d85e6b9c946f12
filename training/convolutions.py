"""A small convolutional network: the teacher of the vision transformer that ships with us.

Convolutions know from the start that neighbours belong together, and so learn from 60,000 images
in minutes what a transformer would need far longer for. The transformer then learns from it, by
its answers and by what it sees at each place. Only the transformer is served.

Legend: B batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALFWAY = 4  # modules, which leave 14x14 places


@dataclass(frozen=True, slots=True)
class Seen:
    """What the network makes of a batch: at each place of a 7x7 grid, and on the whole."""

    parts_BCHW: Tensor  # halfway: of each place, its four quarters
    places_BCHW: Tensor
    logits_BK: Tensor


class Convolution(nn.Module):
    """3x3, normalized over the batch, rectified. Its weight is a matrix, as Muon wants it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(outputs, inputs * 9))
        nn.init.kaiming_normal_(self.kernel, nonlinearity="relu")
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        kernel = self.kernel.view(-1, channels, 3, 3)
        return F.relu(self.norm(F.conv2d(x_BCHW, kernel, padding=1)))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(Convolution(channels, channels), Convolution(channels, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner: Tensor = self.inner(x_BCHW)
        return x_BCHW + inner


class Convolutions(nn.Module):
    """28x28 grey levels, normalized -> 7x7 places of 4x4 pixels -> classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.width = 4 * width
        self.parts_width = 4 * 2 * width
        self.body = nn.Sequential(
            Convolution(1, width),
            nn.MaxPool2d(2),
            Convolution(width, 2 * width),
            Residual(2 * width),
            nn.MaxPool2d(2),
            Convolution(2 * width, 4 * width),
            Residual(4 * width),
        )
        self.head = nn.Linear(4 * width, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x_BHW: Tensor) -> Seen:
        x_BCHW = x_BHW[:, None].contiguous(memory_format=torch.channels_last)
        halfway_BCHW = self.body[:HALFWAY](x_BCHW)
        places_BCHW = self.body[HALFWAY:](halfway_BCHW)
        parts_BCHW = F.pixel_unshuffle(halfway_BCHW, 2)
        return Seen(parts_BCHW, places_BCHW, self.head(places_BCHW.mean((2, 3))))
