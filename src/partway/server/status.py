"""Where a job stands, for its operator."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Status:
    """One job's."""

    id: str
    name: str
    state: str = "waiting"
    """waiting, running, done, failed, refused or stopped"""
    message: str = ""
    exit_code: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    """Of the last step, where the server has the labels."""
    waits_for: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_left: float | None = None
    bytes_received: dict[str, int] = field(default_factory=dict)
    """From each site, since it connected."""
    bytes_sent: dict[str, int] = field(default_factory=dict)
    """To each site, since it connected."""

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")

    def line(self) -> str:
        """For a person.

        >>> Status("0a1b2c", "thyroid", "running", step=20, steps=400, loss=0.71, seconds_left=4.2).line()
        'thyroid (0a1b2c): running, step 20 of 400, loss 0.7100, about 4 s left'
        """
        parts = [f"{self.name} ({self.id}): {self.state}"]
        if self.steps:
            parts.append(f"step {self.step} of {self.steps}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.seconds_left is not None and self.state == "running":
            parts.append(f"about {self.seconds_left:.0f} s left")
        return ", ".join([*parts, self.message] if self.message else parts)
