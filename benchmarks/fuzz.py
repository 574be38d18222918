"""Damaged and hostile segments by the thousand: each is refused in one line, or still a segment, which runs apart.

Any value anywhere in a signed program is exchanged for another, or bytes of it are; anything but a refusal or a segment
is a fault. Of those that are still segments, one in fifty runs in a confined process, which may fail and not crash this
one.

    python benchmarks/fuzz.py [--quick]        10 minutes; 20 seconds
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import torch
from reporting import Claim, report
from rich.progress import Progress
from safetensors.torch import load
from torch import Tensor, nn

from partway.apart.confined import Confined
from partway.errors import CutError, JobFailed
from partway.model import bundle
from partway.model.cut import cut

OPERATORS = [
    "aten.relu.default",
    "aten.cat.default",
    "aten.lstm.input",
    "aten.as_strided.default",
    "aten.zeros.default",
]


class Small(nn.Module):
    """A convolution, a recurrent layer, a table of vectors and an index: what is not safe against its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(2, 4, 3), nn.LSTM(4, 4, batch_first=True)
        self.table, self.last = nn.Embedding(5, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.conv(x).relu().transpose(1, 2))
        kinds = h[:, 0].argmax(1)
        return self.last(torch.cat([h[:, [-1]].squeeze(1), self.table(kinds)], 1))


def value(draw: random.Random, words: Any) -> Any:
    """Something that could stand anywhere."""
    return draw.choice(
        [
            lambda: None,
            lambda: draw.choice([True, False]),
            lambda: draw.choice([0, 1, -1, 2**31, 2**63, -(2**63), draw.randrange(-100, 100)]),
            lambda: draw.choice([0.0, -1e308, 1e-300, draw.random()]),
            lambda: "".join(chr(draw.randrange(0x20, 0x250)) for _ in range(draw.randrange(8))),
            lambda: draw.choice(OPERATORS),
            lambda: {"type": "value", "name": draw.choice([node["name"] for node in words["training"]["nodes"]])},
            lambda: [value(draw, words) for _ in range(draw.randrange(4))],
        ]
    )()


def damaged(draw: random.Random, data: bytes) -> bytes:
    if draw.random() < 0.3:
        start, length = draw.randrange(len(data)), draw.randrange(20)
        return data[:start] + draw.randbytes(draw.randrange(20)) + data[start + length :]
    words = json.loads(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place: Any = words
        while isinstance(place, dict | list) and place:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.1:
                place[key] = value(draw, json.loads(data))
                break
            place = place[key]
    return json.dumps(words).encode()


def main(quick: bool) -> None:
    seconds = 20 if quick else 600
    torch.set_num_threads(1)
    draw, counts, faults = random.Random(0), Counter[str](), []
    pieces = cut(Small(), torch.randn(4, 2, 12), ["rnn"])
    whole = [bundle.packed(piece) for piece in pieces]  # type: ignore[arg-type]
    inputs = [torch.randn(3, 2, 12), torch.randn(3, 10, 4)]
    began = time.monotonic()
    with Progress() as progress:
        task = progress.add_task("damaged segments", total=seconds)
        while (spent := time.monotonic() - began) < seconds:
            progress.update(task, completed=spent)
            number = draw.randrange(2)
            program, weights = whole[number]
            data = damaged(draw, program)
            try:
                piece = bundle.assembled(bundle.parsed(data, 100_000), load(weights))
                counts["still a segment"] += 1
            except CutError as error:
                counts["refused"] += 1
                if len(str(error)) > 1000 or "\n" in str(error):
                    faults.append(f"not one line: {error!r}")
                continue
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")
                continue
            if counts["still a segment"] % 50 == 0:
                apart = Confined(piece, memory=1 << 30, seconds=10)
                try:
                    apart.train()(inputs[number])
                    counts["ran"] += 1
                except (CutError, JobFailed) as error:
                    counts["failed apart" if isinstance(error, CutError) else "ended apart"] += 1
                finally:
                    apart.close()
    tried = counts["refused"] + counts["still a segment"]
    claims = [
        Claim("fuzz_faults", len(faults), f"faults in {tried:,} damaged segments", "0", not faults),
        Claim("fuzz_seconds", seconds, "s", f"at least {seconds}", True),
    ]
    lines = [f"* {what}: {count:,}" for what, count in sorted(counts.items())] + [
        f"* FAULT: {fault}" for fault in faults[:50]
    ]
    report("fuzz", claims, lines, len(os.sched_getaffinity(0)), quick)


if __name__ == "__main__":
    main("--quick" in sys.argv)
