"""Split learning between hospitals and a server: each site trains partway on its own records, the server the rest.

These names are the public interface; a module below this one may change from one version to the next. Each name is
loaded when it is first used, so that `import partway` is quick and loads no torch.

>>> import partway
>>> partway.Refused.__name__
'Refused'
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from partway.errors import JobFailed, PartwayError, PeerError, Refused, UsageError

if _TYPE_CHECKING:
    from partway.config import Job
    from partway.data.records import Target
    from partway.model.cut import cut
    from partway.model.cuts import cuts
    from partway.report import Result
    from partway.simulation import simulate

__version__ = "0.1.0"

__all__ = [
    "Job",
    "JobFailed",
    "PartwayError",
    "PeerError",
    "Refused",
    "Result",
    "Target",
    "UsageError",
    "__version__",
    "cut",
    "cuts",
    "simulate",
]

_HOMES = {
    "Job": "partway.config",
    "Result": "partway.report",
    "Target": "partway.data.records",
    "cut": "partway.model.cut",
    "cuts": "partway.model.cuts",
    "simulate": "partway.simulation",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'partway' has no attribute {name!r}")
    value = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
