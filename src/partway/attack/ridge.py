"""The closed-form decoder: ridge regression from activations back to records.

No training, and as good as a network of many epochs at every cut that was measured. It asks how much of a record a
linear map can read off the cut: with it, a server can tell which patient of many an activation belongs to.

>>> import torch
>>> x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
>>> view = View(known_records=x[:200], known_activations=x[:200] * 3 + 1, seen_activations=x[200:] * 3 + 1)
>>> linkage(decode(view), x[200:])
1.0
"""

from __future__ import annotations

import torch
from torch import Tensor

from partway.attack.view import View


def decode(view: View, strength: float = 1e-2) -> Tensor:
    """Records as the adversary makes them out, shape (m, features), float64.

    W = (Z'Z + strength n I)^-1 Z'(X - mean X), with activations Z standardised by what is known.
    """
    x, z = view.known_records.double(), view.known_activations.double()
    center, scale = z.mean(0), z.std(0, correction=0).clamp(min=1e-12)
    z = (z - center) / scale
    ridge = z.T @ z + strength * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(ridge, z.T @ (x - x.mean(0)))
    decoded: Tensor = ((view.seen_activations.double() - center) / scale) @ weights + x.mean(0)
    return decoded


def linkage(decoded: Tensor, records: Tensor) -> float:
    """How often the nearest of all `records` is the right one: row i of both is the same patient.

    Records that are equal to the last digit cannot be told apart by anybody: of k such, the right one counts 1/k.

    Args:
        decoded: shape (m, features).
        records: shape (m, features); chance is 1/m.
    """
    records = records.double()
    nearest = torch.cdist(decoded.double(), records).argmin(1)
    same = (records.unsqueeze(0) == records.unsqueeze(1)).all(-1)
    hits = same[torch.arange(len(records)), nearest].double() / same.sum(1)
    return float(hits.mean())
