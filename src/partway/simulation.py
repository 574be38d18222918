"""All parties of a job in one process, over memory transport: the same parties, door and frames as the real thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch.utils.data import Dataset

from partway import pki
from partway.assembly import Assembled, Place, assemble, schemas_of
from partway.blueprint import Schemas, configured
from partway.config import Job, Policy, read_job, read_job_file, said
from partway.data.records import Records, Target
from partway.egress import Tap
from partway.errors import DataError, JobFailed, PartwayError
from partway.outcome import result_of
from partway.party import Out
from partway.report import Result
from partway.shipped import Reader
from partway.train.draws import derived
from partway.transport.memory import Wire
from partway.wire import frames

SERVER = "server"


def permissive(*builds: str, segments: Iterable[str] = ()) -> Policy:
    """What a simulated party allows: everything, for nobody's records leave this process."""
    return Policy(
        networks=list(builds),
        segments=list(segments),
        operators=["simulate"],
        labels_may_leave=True,
        scores_may_leave=True,
        bottom_to_everyone=True,
        trunk_to_everyone=True,
        widest_cut=2**31 - 1,
        most_epochs=2**31 - 1,
        most_parameters=2**31 - 1,
        most_flops=2**53 - 1,
        least_sites=2,
        least_records_in_sum=0,
        least_records_in_hand_over=0,
        solvable_sums=True,
        least_records_in_counts=1,
        clear_sums=True,
        predictions_may_leave=True,
    )


@dataclass
class Federation:
    """The parties of a job in one process."""

    job: Job
    digest: bytes
    secrets: dict[str, bytes]
    """Of each party."""
    parties: dict[str, Assembled]
    shipped: Reader
    """Runs segments that came without code."""

    def run(self, wire: Wire | None = None, watch: Callable[[str, Assembled], None] | None = None) -> None:
        """Delivers messages until nothing moves. Raises what a party raises; `JobFailed` if one has not ended.

        Args:
            wire: delivers in order if not given.
            watch: called with each party that has taken a message.
        """
        try:
            self._deliver(wire or Wire(), watch)
        except PartwayError as error:
            self._end(type(error).__name__)
            raise
        self._end("done")

    def _end(self, outcome: str) -> None:
        for assembled in self.parties.values():
            assembled.ledger.end(outcome)
        self.shipped.close()

    def _deliver(self, wire: Wire, watch: Callable[[str, Assembled], None] | None) -> None:
        def post(sender: str, out: Out) -> None:
            for link, made in out:
                if made:
                    wire.put(sender, link, b"".join(made))

        for name, assembled in self.parties.items():
            post(name, assembled.party.start())
        while (taken := wire.take()) is not None:
            sender, receiver, message = taken
            for frame in frames.split(message, sender):
                if receiver == SERVER and frame.head.to != SERVER:
                    wire.put(SERVER, frame.head.to, bytes(frame.data))  # between two sites: forwarded, unread
                    continue
                post(receiver, self.parties[receiver].party.receive(sender, frame))
                if watch is not None:
                    watch(receiver, self.parties[receiver])
        stuck = {name: a.party.session.waits_for() for name, a in self.parties.items() if not a.party.ended}
        if stuck:
            waits = "; ".join(f"{name} waits for {', '.join(missing)}" for name, missing in stuck.items())
            raise JobFailed(f"nothing moves any more: {waits}")


def federation(
    job: Job,
    records: Mapping[str, Records],
    *,
    policies: Mapping[str, Policy] | None = None,
    taps: Mapping[str, Tap] | None = None,
    folder: Path | None = None,
    earlier: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
) -> Federation:
    """All parties of a job, each with its own certificate, secret, policy, door and ledger.

    Args:
        records: by site; the job's roster is made from it.
        policies: of parties that do not allow everything.
        taps: see every plaintext that leaves a party.
        folder: each party's ledger goes into a folder of its name here.
        earlier: what jobs before this one have left at each party is in a folder of its name here.
        weights: where all parties' files of weights and folders of segments lie that the job names by digest.
    """
    steward = pki.Authority.create("simulate")
    names = sorted(records) if job.laned else [p for p in configured(job, SERVER).parties if p != SERVER]
    identities = {site: steward.admit(site, pki.Role.SITE) for site in names}
    identities[SERVER] = steward.admit(SERVER, pki.Role.SERVER, ["localhost"])
    everyone = {name: identity.fingerprint for name, identity in identities.items()}
    # Keys are fresh in each run, and what stands for the signed job is not: the same job draws the same again.
    unsigned = msgspec.structs.replace(job, roster=dict.fromkeys(names, ""))
    digest = derived(b"partway/simulate", msgspec.json.encode(said(unsigned), order="sorted").hex())
    job = msgspec.structs.replace(job, roster={site: everyone[site] for site in names})
    secrets = {name: derived(b"partway/simulate", job.job.seed, name) for name in identities}
    schemas, shipped = _schemas(job, records), Reader(weights, None)
    parties = {}
    for name, identity in identities.items():
        home = folder / name if folder else None
        if home:
            home.mkdir(parents=True, exist_ok=True)
        place = Place(
            identity=identity,
            policy=(policies or {}).get(name) or permissive(*job.builds, segments=job.shipped.values()),
            secret=secrets[name],
            records=records.get(name),
            folder=home,
            earlier=earlier / name if earlier else None,
            weights=weights,
            shipped=shipped,
            device=device,
            tap=(taps or {}).get(name),
        )
        parties[name] = assemble(job, digest, "simulate", everyone, SERVER, place, schemas, pki.signed_by)
    return Federation(job, digest, secrets, parties, shipped)


def _schemas(job: Job, records: Mapping[str, Records]) -> Schemas:
    """What each party's records look like. Raises `DataError` if they are not what the job says."""
    found = {party: r.schema for party, r in records.items()}
    if job.laned and len(set(found.values())) != 1:
        looks = sorted(map(str, set(found.values())))
        raise DataError(f"the sites' records do not look alike: {', '.join(looks)}")
    for party, due in schemas_of(job).items() if job.columns is not None else ():
        if party in found and found[party] != due:
            raise DataError(f"the job's records are {due}; those given of {party} are {found[party]}")
    if not job.laned and (missing := [p for p in configured(job, SERVER).holders if p not in found]):
        raise DataError(f"no records are given of {', '.join(missing)}")
    return found


def simulate(
    job: Job | str | Path,
    data: Mapping[str, Records] | Mapping[str, Dataset[Any]],
    *,
    classes: int | None = None,
    target: Target | None = None,
    folder: Path | None = None,
    weights: Path | None = None,
    watch: Callable[[str, Assembled], None] | None = None,
) -> Result:
    """Runs a job in one process and returns what all its parties know together.

    Args:
        job: a `Job`, the text of a job file, or its path. Its roster is made from `data`.
        data: by site, its `Records`, or any PyTorch dataset of (features, label), which is divided by the job's seed.
        classes: how many there are, where `data` holds datasets.
        target: in place of `classes`, what their labels are.
        folder: where ledgers, result and network are written; nothing is written without it.
        weights: where files of weights and folders of segments lie that the job names by digest.
        watch: called with each party that has taken a message, for progress.

    Raises:
        ConfigError: the job cannot be read, or its network does not fit the records.
        DataError: there are no records, or the sites' do not look alike.
        CutError: the network cannot be cut there.
    """
    if not isinstance(job, Job):
        job = read_job_file(job) if isinstance(job, Path) else read_job(job)
    records: dict[str, Records] = {}
    for site, given in data.items():
        if isinstance(given, Records):
            records[site] = given
        elif classes is None and target is None:
            raise DataError("simulate needs classes=... or target=... where data holds datasets")
        else:
            records[site] = Records.from_dataset(given, classes or 0, job.job.seed, target)
    if classes is not None or target is not None:
        job = msgspec.structs.replace(job, records=msgspec.structs.replace(job.records, schema="dataset"), columns=None)
    began = time.perf_counter()
    whole = federation(job, records, folder=folder, weights=weights)
    whole.run(watch=watch)
    result = together(whole, time.perf_counter() - began)
    if folder is not None:
        result.write(folder)
    return result


def together(whole: Federation, seconds: float) -> Result:
    """What all parties of a run know, as one result."""
    each = {name: result_of(assembled, seconds) for name, assembled in whole.parties.items()}
    result = each[SERVER]
    result.party = "simulate"
    for site in whole.job.sites:
        own = each[site]
        result.sites.update(own.sites)
        result.cost.update(own.cost)
        result.ledgers.update(own.ledgers)
        result.all, result.validation = own.all or result.all, own.validation or result.validation
        result.targets.update(own.targets)
        prefix = f"sites.{site}." if whole.job.apart else ""
        result.weights.update({prefix + name: weight for name, weight in own.weights.items()})
        result.chosen.update(own.chosen)
        result.scaling = own.scaling if whole.job.laned else {}
        result.whole = result.whole or own.whole
    state = next(iter(whole.parties.values())).network.whole.state_dict()
    result.whole = result.weights.keys() == state.keys()
    return result
