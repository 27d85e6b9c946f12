"""What rows that are each a request's take of the channels granted to them, decided on a device.

It takes as allowances.py does, channel for channel, in tensors: so no layer of a decode step waits
for the device. What is known only there, who owes what, comes to the host once, after the step.

Shape letters: L layers   T sites   G rungs   N packed tokens, each of another request   R rows
    I inputs   K kinds of rows
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from elastiformer.allowances import leave, owed
from elastiformer.sequence import Sequence as Owner
from elastiformer.thresholds import HASTE, PATIENCE


class DeviceAllowances:
    """Of one step, in which some rows take by thresholds and no request has two rows.

    Args:
        owners: the request of each row.
        takes_N: which rows take by thresholds; others take what they are granted.
        channels_LTK: granted, by kind.
        outputs_LT: of the products at each site, side by side.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        takes_N: np.ndarray,
        channels_LTK: np.ndarray,
        kind_N: np.ndarray,
        ladder_LTG: Tensor,
        outputs_LT: np.ndarray,
    ) -> None:
        assert len(owners) == len(takes_N), "rows of one request in one step"
        self._device = ladder_LTG.device
        self._owners, self._takes_N, self._outputs_LT = owners, takes_N, outputs_LT
        self._granted_LTN, self._ladder_LTG = channels_LTK[:, :, kind_N], ladder_LTG
        self._before_LTN = owed(owners, *ladder_LTG.shape[:2])
        self._at, self._rows_R = (-1, -1), np.empty(0, dtype=np.int64)
        self._kept_RI = torch.empty(0, 0, dtype=torch.bool, device=self._device)

    # What the layers ask for goes over at once.

    @cached_property
    def _debts_LTN(self) -> Tensor:
        return torch.tensor(self._before_LTN, device=self._device)  # the first debts are kept

    @cached_property
    def _grants_LTN(self) -> Tensor:
        return torch.from_numpy(self._granted_LTN).to(self._device)

    @cached_property
    def _takers_N(self) -> Tensor:
        return torch.from_numpy(self._takes_N).to(self._device)

    @property
    def asked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
        """Which rows take, what is granted and what was owed before: [N], [L, T, N]; the ladders.

        For who takes in all layers at once, and says afterwards what is owed (`owe`).
        """
        return self._takes_N, self._granted_LTN, self._before_LTN, self._ladder_LTG

    def owe(self, debts_LTN: Tensor) -> None:
        """What is owed after all layers."""
        self._debts_LTN = debts_LTN

    def granted(self, layer: int, site: int, rows_R: np.ndarray, inputs: int) -> int:
        """How many channels the rows may take in all."""
        return int(np.minimum(self._granted_LTN[layer, site, rows_R], inputs).sum())

    def take(
        self, layer: int, site: int, rows_R: np.ndarray, x_RI: Tensor, norms_I: Tensor
    ) -> Tensor:
        """Which channels the rows take: bool [R, I].

        What reads the same site again, some of its rows, is told the same.
        """
        if self._at == (layer, site):
            if len(rows_R) == len(self._rows_R):
                return self._kept_RI
            at_R = np.searchsorted(self._rows_R, rows_R)
            return self._kept_RI[torch.from_numpy(at_R).to(x_RI.device)]
        inputs, rungs = x_RI.shape[1], self._ladder_LTG.shape[2] - 1
        index_R = self._index(rows_R, x_RI.device)
        granted_R = self._grants_LTN[layer, site][index_R].clamp(max=inputs)
        debt_R = self._debts_LTN[layer, site][index_R]
        beyond_R = debt_R - torch.minimum(torch.maximum(debt_R, -granted_R), granted_R)
        wanted_R = PATIENCE * granted_R - debt_R - (HASTE - 1) * beyond_R
        rung_R = (2 * rungs * wanted_R + PATIENCE * inputs) // (2 * PATIENCE * inputs)
        least_R = self._ladder_LTG[layer, site][rung_R.clamp(1, rungs)]
        size_RI = x_RI.float().abs() * norms_I
        takes_R = self._takers_N[index_R] & (granted_R < inputs)
        reaches_RI = ~(size_RI < least_R[:, None])  # what is no number does
        kept_RI = torch.where(
            takes_R[:, None], reaches_RI, self._largest(layer, site, rows_R, size_RI, granted_R)
        )
        more_R = torch.where(takes_R, kept_RI.sum(1) - granted_R, 0)
        self._debts_LTN[layer, site].index_add_(0, index_R, more_R)
        self._at, self._rows_R, self._kept_RI = (layer, site), rows_R, kept_RI
        return kept_RI

    def _index(self, rows_R: np.ndarray, device: torch.device) -> Tensor:
        if len(rows_R) == len(self._takes_N):
            return self._all_N
        return torch.from_numpy(rows_R).to(device)

    @cached_property
    def _all_N(self) -> Tensor:
        return torch.arange(len(self._takes_N), device=self._takers_N.device)

    def _largest(
        self, layer: int, site: int, rows_R: np.ndarray, size_RI: Tensor, granted_R: Tensor
    ) -> Tensor:
        """The channels of rows that take what they are granted; all, where no such row picks."""
        inputs = size_RI.shape[1]
        picks_R = ~self._takes_N[rows_R] & (self._granted_LTN[layer, site, rows_R] < inputs)
        if not picks_R.any():
            return torch.ones((), dtype=torch.bool, device=size_RI.device)
        order_RI = size_RI.argsort(dim=1, descending=True)
        best_RI = torch.arange(inputs, device=size_RI.device) < granted_R[:, None]
        return torch.zeros_like(best_RI).scatter_(1, order_RI, best_RI)

    @cached_property
    def beyond(self) -> tuple[np.ndarray, np.ndarray]:
        """What each row took beyond its grants: multiply-adds and channels, int64 [N]."""
        more_LTN = self._after_LTN - self._before_LTN
        return (more_LTN * self._outputs_LT[:, :, None]).sum((0, 1)), more_LTN.sum((0, 1))

    @cached_property
    def _after_LTN(self) -> np.ndarray:
        """Asked for once all layers have run; here the host waits for them."""
        after_LTN: np.ndarray = self._debts_LTN.cpu().numpy()
        return after_LTN

    def settle(self) -> None:
        """Leave each request with what it owes now."""
        leave(self._owners, self._after_LTN)


class AmongOthers(DeviceAllowances):
    """Of a step of any rows, some of which take by thresholds: what their requests owe.

    Args:
        rows_Q: the first row of each request that takes.
        count: of all rows.
        owners, kind_Q: of those, in the same order.
    """

    def __init__(
        self,
        rows_Q: np.ndarray,
        count: int,
        owners: Sequence[Owner],
        channels_LTK: np.ndarray,
        kind_Q: np.ndarray,
        ladder_LTG: Tensor,
        outputs_LT: np.ndarray,
    ) -> None:
        all_Q = np.ones(len(rows_Q), dtype=bool)
        super().__init__(owners, all_Q, channels_LTK, kind_Q, ladder_LTG, outputs_LT)
        self._rows_Q, self._count, self.owners = rows_Q, count, len(owners)

    @cached_property
    def beyond(self) -> tuple[np.ndarray, np.ndarray]:
        """What each request took beyond its grants, noted at one of its rows: int64 [N]."""
        products_N, channels_N = np.zeros((2, self._count), dtype=np.int64)
        products_N[self._rows_Q], channels_N[self._rows_Q] = super().beyond
        return products_N, channels_N
