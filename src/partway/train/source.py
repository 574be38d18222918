"""A site's records as its worker takes them: in a secret order, standardised by what all sites have agreed on."""

from __future__ import annotations

import torch
from torch import Tensor

from partway.data.records import Records
from partway.plan.plan import Turn
from partway.train.draws import order_of


class RecordSource:
    """One site's records in one job.

    Args:
        secret: this site's; together with the job it decides which record stands where.
        job: digest of the signed job.
    """

    def __init__(
        self, records: Records, secret: bytes, job: bytes, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.records, self._secret, self._job, self._dtype, self._device = records, secret, job, dtype, device
        self.labels = records.labels.to(device)
        self.features = records.features.to(device)
        """As read, float64, until `standardise` is called."""
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        if not records.schema.numeric:
            self.features = self.features.to(dtype)

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Numeric columns in units of what all sites have agreed on, in the job's dtype from now on."""
        self.features = self.records.scaled(mean, deviation).to(self._device, self._dtype)

    def take(self, turn: Turn, offset: int, rows: int) -> tuple[Tensor, Tensor]:
        """Features and labels of this site's rows of a turn: in secret order where segments train, else as they stand.

        Args:
            offset: where the rows begin in that order.
        """
        index = self.records.division[turn.records]
        if turn.train:
            if turn.epoch != self._epoch:
                self._epoch, self._order = turn.epoch, index[order_of(len(index), self._secret, self._job, turn.epoch)]
            index = self._order
        chosen = index[offset : offset + rows].to(self._device)
        return self.features.index_select(0, chosen), self.labels.index_select(0, chosen)
