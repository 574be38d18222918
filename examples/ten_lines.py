"""Three hospitals and a server in one process: the same parties, door and frames as between machines."""

import torch
from torch.utils.data import TensorDataset

import partway

JOB = """
[job]
name = "ten-lines"
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 6, hidden = [16, 8, 16], classes = 2 }
cut = ["hidden.2"]
[training]
epochs = 20
batch = 64
"""


def hospital(records: int) -> TensorDataset:
    """Any PyTorch dataset of (features, label)."""
    x = torch.randn(records, 6)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


result = partway.simulate(JOB, {"north": hospital(300), "south": hospital(200), "west": hospital(80)}, classes=2)
print(f"all test records: accuracy {result.all['accuracy']:.2f}, macro-AUC {result.all['macro_auc']:.3f}")
print(f"west sent {result.cost['west'].bytes_up:,} bytes; the server holds {result.holds['server']}")
