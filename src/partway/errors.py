"""Every error that Partway raises on purpose, in one tree. The class says whose fault it is, the message what to do.

::

    PartwayError                    exit code 1
    |-- UsageError                  2   our own words or files are wrong
    |   |-- ConfigError                 a job, site or server file
    |   |-- DataError                   a file of records
    |   |-- PlanError                   a plan that cannot run; `faults` has all of them
    |   |-- CutError                    a network that cannot be cut there
    |   `-- TrustError                  a key, certificate or signature among our own files
    |-- PeerError                   1   another party said what it may not; `peer` names it
    |   |-- OtherRecords                another party goes by another list of the same patients
    |   `-- LinkLost                    another party is gone, or silent for too long
    |-- Refused                     3   a site's policy said no; `reasons` has the enums
    `-- JobFailed                   1   the job stopped; the message says where and why

Anything else that escapes is a bug in Partway.
"""

from __future__ import annotations

from collections.abc import Sequence


class PartwayError(Exception):
    """One clear line for a person; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(PartwayError):
    """Wrong words or files on our own side."""

    exit_code = 2


class ConfigError(UsageError):
    """A job, site or server file says something that cannot be."""


class DataError(UsageError):
    """A file of records is damaged, or holds what the job does not expect.

    `faults` are column numbers of the schema and enum names, safe to tell others; the message may hold a value.
    """

    def __init__(self, message: str, faults: Sequence[tuple[int, str]] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(message)


class PlanError(UsageError):
    """A plan that cannot run. `faults` lists every fault, the message shows them all."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


class CutError(UsageError):
    """A network that cannot be cut as asked; the message lists where it can."""


class TrustError(UsageError):
    """A key, certificate or signature that we hold or were handed as a file is not what it must be."""


class PeerError(PartwayError):
    """Another party said something that it may not say now, or never may."""

    def __init__(self, peer: str, what: str) -> None:
        self.peer = peer
        super().__init__(f"{peer}: {what}")


class OtherRecords(PeerError):
    """Another party, with columns of the same patients, has others of them, or has them in another order."""


class LinkLost(PeerError):
    """Another party's link is gone, or it has been silent for longer than the heartbeat allows."""


class Refused(PartwayError):
    """This site's policy does not allow what the job asks for. `reasons` are enum names, safe to tell others."""

    exit_code = 3

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        self.reasons = tuple(reasons)
        super().__init__(message)


class JobFailed(PartwayError):
    """A job ended without a result."""
