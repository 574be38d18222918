"""A site's process whose door has a tap: every plaintext that leaves is also written to a file. For tests.

python tapped_site.py site.toml plaintexts.bin
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import uvloop
from torch import Tensor

from partway.config import read_site
from partway.protocol.messages import Head, Letter
from partway.site.agent import Agent


def main(file: Path, plaintexts: Path) -> None:
    with plaintexts.open("wb") as out:

        def tap(head: Head, letter: Letter, tensors: Mapping[str, Tensor]) -> None:
            for tensor in tensors.values():
                out.write(tensor.detach().cpu().contiguous().numpy().tobytes())
            out.flush()

        agent = Agent(read_site(file), file.parent, lambda p: print(json.dumps(asdict(p)), flush=True), tap)
        uvloop.run(agent.serve())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
