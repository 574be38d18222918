"""How often a site's records were handed over to be kept: a line for each job, beside the jobs' folders.

A site with other records begins a new file.
"""

from __future__ import annotations

import time
from pathlib import Path

from partway.errors import JobFailed


class Releases:
    """The file `releases.log` in the folder where jobs leave theirs."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "releases.log"

    @property
    def count(self) -> int:
        """Jobs that records were released in."""
        return len(self._path.read_text().splitlines()) if self._path.exists() else 0

    def note(self, job: str, digest: bytes) -> None:
        """One more. Raises `JobFailed` if the disk does not take it: then nothing may leave."""
        try:
            with self._path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {job} {digest.hex()}\n")
        except OSError as error:
            raise JobFailed(f"{self._path} cannot be written ({error.strerror}), so nothing leaves") from None
