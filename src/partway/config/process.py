"""What a process at a site or a server is told, and what it allows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, field

from partway.config.words import Count, Fingerprint, Name, Positive, Settings, contents, read
from partway.errors import ConfigError


class Policy(Settings, frozen=True, kw_only=True):
    """`[policy]`: what this party allows. The defaults allow no more than training needs."""

    networks: list[str] = []
    """Networks that may be built, as exact strings `module:name`."""
    segments: list[Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]] = []
    """Signed segments that may run here, by digest: `partway segment show` says what one does."""
    operators: list[str] = []
    """People whose jobs this party takes part in, by certificate name."""
    sites: dict[Name, Fingerprint] = {}
    """Other sites this one works with, with their pinned key fingerprints; empty takes the roster of the signed job."""
    labels_may_leave: bool = False
    """`vanilla` sends labels; false allows `u_shaped` only."""
    scores_may_leave: bool = False
    """This site's own scores, exact, beside what blind sums say of all."""
    bottom_to_everyone: bool = False
    """Of a site: the server may hold the sites' segments at the end."""
    trunk_to_everyone: bool = False
    """Of the server: its segment may travel to the sites, which evaluation there needs."""
    predictions_may_leave: bool = False
    """Of who has the last segment, mostly the server: what it puts out may go to who holds the labels."""
    widest_cut: Positive = 64
    """Numbers a record that may leave across a cut."""
    most_epochs: Positive = 100
    """At this site."""
    most_releases: Positive = 1
    """Times that a record's activations may be handed over to be kept, over all jobs (`half_trained`)."""
    most_parameters: Positive = 10_000_000
    """Of the whole network."""
    most_flops: Annotated[int, Meta(ge=1, lt=2**53)] = 10**10
    """Floating-point operations for one record, forward and backward through this party's segments."""
    least_sites: Positive = 3
    """Sites in a sum; with 2, a total minus one's own share is the other's."""
    least_records_in_sum: Count = 20
    """Records of the others, seen from any site, in each step's sum of gradients."""
    least_records_in_hand_over: Count = 20
    """Training records behind weights that one site has trained by itself and hands to another."""
    solvable_sums: bool = False
    """Also fewer than twice (inputs of the first layer + 1): their records can be solved for, exactly."""
    least_records_in_counts: Positive = 50
    """Records of all sites behind statistics and scores."""
    clear_sums: bool = False
    """Sums may be added in the clear."""


def of_any_size(networks: Iterable[str]) -> Policy:
    """What allows these networks and is asked for nothing else: for who builds them for himself."""
    return Policy(networks=list(networks), most_parameters=2**31 - 1)


class Connection(Settings, frozen=True, kw_only=True):
    """`[data]` of a site: where its records are."""

    connector: Literal["csv", "parquet"] = "csv"
    path: Annotated[str, Meta(min_length=1)]
    """Relative to the site file. A CSV file has a header and commas, and may be compressed (`.gz`)."""
    site: Name | None = None
    """Only this site's rows are read, by the schema's site column; without it all are."""
    ids: str = ""
    """A file of the agreed ids, one a line, relative to the site file: where other parties hold other columns of the
    same patients. Without it, all ids of this file count, sorted."""
    units: dict[str, str] = {}
    """By column, the unit in this file, where the schema's must be confirmed."""


class SiteHeader(Settings, frozen=True, kw_only=True):
    """`[site]`"""

    name: Name
    """As in its certificate."""
    server: Annotated[str, Meta(pattern=r"^[^\s:]+:\d{1,5}$")]
    """host:port, to which this site opens its one connection."""
    identity: str = "identity"
    """The folder of key, certificate and authority, relative to the site file."""
    folder: str = "runs"
    """Where jobs leave their files, relative to the site file."""
    weights: str = "weights"
    """Where files of weights and folders of segments lie that jobs name by digest, relative to the site file."""
    silence: Annotated[float, Meta(ge=1, le=3600)] = 30.0
    """Seconds without a sign of life after which a link is given up."""
    device: Annotated[str, Meta(max_length=32)] = "auto"
    """As PyTorch names it; `auto` is CUDA where there is one."""


class Site(Settings, frozen=True, kw_only=True):
    """A hospital's own file; the server never sees it."""

    site: SiteHeader
    data: Connection | None = None
    """None at a party that only runs layers."""
    predict: Connection | None = None
    """Of whom jobs with `[predict]` predict: as `[data]`, and no label is read."""
    policy: Policy


class ServerHeader(Settings, frozen=True, kw_only=True):
    """`[server]`"""

    name: Name = "server"
    """As in its certificate."""
    listen: Annotated[str, Meta(pattern=r"^[^\s:]+:\d{1,5}$")] = "0.0.0.0:8443"
    """host:port; `0.0.0.0` is every address of this machine."""
    identity: str = "identity"
    """The folder of key, certificate and authority, relative to the server file."""
    folder: str = "runs"
    """Where jobs leave their files, relative to the server file."""
    weights: str = "weights"
    """Where files of weights and folders of segments lie that jobs name by digest, relative to the server file."""
    silence: Annotated[float, Meta(ge=1, le=3600)] = 30.0
    """Seconds without a sign of life after which a link is given up."""
    device: Annotated[str, Meta(max_length=32)] = "auto"
    """As PyTorch names it; `auto` is CUDA where there is one."""


class Server(Settings, frozen=True, kw_only=True):
    """The server's own file."""

    server: ServerHeader = field(default_factory=ServerHeader)
    data: Connection | None = None
    """Where the server holds labels or columns."""
    predict: Connection | None = None
    """The same of those whom jobs with `[predict]` are about."""
    policy: Policy


def read_site(path: Path) -> Site:
    return read(contents(path, ConfigError), Site, str(path))


def read_server(path: Path) -> Server:
    return read(contents(path, ConfigError), Server, str(path))
