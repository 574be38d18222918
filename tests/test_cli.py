"""Each verb as a person types it: what it prints, its exit code, and one clear line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from partway import cli
from partway.config import Connection, Policy, Site, SiteHeader, read_job_file
from partway.local import toml
from partway.site import show
from partway.site.releases import Releases

ROOT = Path(__file__).resolve().parent.parent
JOB = {
    "job": {"name": "thyroid", "seed": 1},
    "network": {
        "build": "partway.model.zoo:mlp",
        "arguments": {"inputs": 29, "hidden": [32, 8, 32], "classes": 7},
        "cut": ["hidden.2"],
    },
    "training": {"epochs": 1, "batch": 512},
}
Type = Callable[..., tuple[int, str, str]]


@pytest.fixture
def type_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """Types a line in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def one(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["partway", *line.split()])
        code = cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return one


@pytest.fixture
def office(type_: Type) -> str:
    """The folder of an operator that the steward has approved."""
    for line in (
        "federation init authority",
        "job request office --identity office",
        "federation approve authority office/request.pem --yes",
    ):
        assert type_(line)[0] == 0
    return "office"


def test_version_and_help(type_: Type) -> None:
    assert type_("--version") == (0, "0.1.0\n", "")
    code, out, err = type_("--help")
    assert (code, err) == (0, "")
    assert all(verb in out for verb in ("demo", "simulate", "data", "federation", "server", "site", "job", "ledger"))


def test_help_waits_for_no_torch() -> None:
    command = "import sys; from partway import cli; sys.argv = ['partway', '--help']; cli.main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert not {"torch", "grpc", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("jop sign", "No such command 'jop'. Did you mean 'job'?"),
        ("job sign", "Missing argument"),
        ("job sign a.toml --identty x", "No such option: --identty"),
        ("job submit job.signed", "Missing option '--server'"),
        ("job list --server localhost", "--server localhost: host:port is needed"),
        ("demo --seeds none", "Invalid value for '--seeds'"),
        ("server request server", "Missing option '--host'"),
        ("job sign no.toml", "no.toml: cannot be read (No such file or directory)"),
        ("simulate no.toml", "no.toml: cannot be read (No such file or directory)"),
        ("site start no.toml", "no.toml: cannot be read (No such file or directory)"),
        ("server start no.toml", "no.toml: cannot be read (No such file or directory)"),
        ("federation approve no request.pem", "request.pem: cannot be read"),
        ("federation roster no", "authority.key: cannot be read"),
        ("ledger verify no.jsonl", "certificate.pem: cannot be read"),
        ("site request ../svi", "'../svi' is no name"),
    ],
)
def test_wrong_words(type_: Type, line: str, words: str) -> None:
    code, out, err = type_(line)
    assert (code, out) == (2, "")
    assert err.startswith("partway: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_verb_alone_prints_its_help(type_: Type) -> None:
    code, out, err = type_("job")
    assert (code, err) == (2, "")
    assert "submit" in out


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("epochs", "epoch", "job.toml: [training] has no key `epoch`; did you mean `epochs`?"),
        ("hidden.2", "hidden.9", "the network has no module `hidden.9`; did you mean"),
        ("hidden.2", "hidden.9", "it can be cut after hidden.0, hidden.1, "),
        ("zoo:mlp", "zoo:mpl", "`partway.model.zoo` has no network `mpl`; did you mean `mlp`?"),
        ("partway.model.zoo:mlp", "os:system", "`os` has no dictionary NETWORKS"),
        ("partway.model.zoo:mlp", "no_such_room:mlp", "no_such_room"),
        ("inputs = 29", "inpts = 29", "has no argument `inpts`; did you mean `inputs`?"),
        ("inputs = 29", "inputs = 28", "takes no records of shape (29,)"),
        ("[training]", "[training", "job.toml: not TOML"),
    ],
)
def test_a_wrong_job_is_not_signed(type_: Type, office: str, before: str, after: str, words: str) -> None:
    Path("job.toml").write_text(toml(JOB).replace(before, after))
    for line in (f"job sign job.toml --identity {office}", "simulate job.toml"):
        code, _, err = type_(line)
        assert code == 2
        assert words in err
        assert err.count("\n") == 1
    assert not Path("job.signed").exists()


def test_only_operators_sign(type_: Type, office: str) -> None:
    type_("site request svi --identity svi")
    type_("federation approve authority svi/request.pem --yes")
    Path("job.toml").write_text(toml(JOB))
    code, _, err = type_("job sign job.toml --identity svi")
    assert (code, err) == (2, "partway: svi is a site; only operators sign jobs\n")
    assert type_(f"job sign job.toml --identity {office}") == (0, "Signed: job.signed\n", "")


def test_the_steward_s_words(type_: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = type_("federation init authority --json")
    assert (code, json.loads(out)["folder"]) == (0, "authority")
    assert Path("authority/authority.key").stat().st_mode & 0o077 == 0
    _, out, _ = type_("site request svi --identity svi --json")
    fingerprint = json.loads(out)["fingerprint"]

    code, out, err = type_("federation approve authority svi/request.pem --json")
    assert (code, out) == (2, "")
    assert "compare the fingerprint with the party first" in err
    monkeypatch.setattr("typer.confirm", lambda _: False)
    code, out, err = type_("federation approve authority svi/request.pem")
    assert code == 2
    assert fingerprint[:4] in out
    assert not Path("svi/certificate.pem").exists()

    code, out, _ = type_("federation approve authority svi/request.pem --yes --json")
    assert json.loads(out) == {"name": "svi", "role": "site", "fingerprint": fingerprint}
    assert json.loads(type_("federation roster authority --json")[1]) == {"roster": {"svi": fingerprint}}
    assert type_("federation roster authority")[1] == f'[roster]\nsvi = "{fingerprint}"\n'
    code, _, err = type_("site request svi --identity svi")
    assert (code, "key.pem exists and is not overwritten" in err) == (2, True)


def test_simulate(type_: Type) -> None:
    Path("job.toml").write_text(toml(JOB))
    code, out, _ = type_("simulate job.toml --folder out --json")
    assert code == 0
    assert sorted(json.loads(out)["sites"]) == ["other", "stmw", "svhc", "svhd", "svi"]
    assert Path("out/server/ledger.jsonl").exists()
    code, out, _ = type_("simulate job.toml")
    assert "svhd: records 25, accuracy 0." in out
    assert out.endswith("nothing was written\n")


SCHEMA = """
[schema]
name = "own"
label = "outcome"
site = "clinic"
[classes]
well = ["well"]
ill = ["ill"]
[columns]
x = { kind = "numeric", unit = "mmol/l", range = [0, 9], reference = [1, 3], marks = true }
"""
OWN = JOB | {
    "network": JOB["network"] | {"arguments": {"inputs": 1, "hidden": [8, 4, 8], "classes": 2}},
    "records": {"schema": "own.toml"},
}


def own_file(**changed: str) -> None:
    """A schema, a job and a file of three sites; `changed` exchanges words of its lines of that site."""
    Path("own.toml").write_text(SCHEMA)
    Path("job.toml").write_text(toml(OWN))
    lines = [f"{('north', 'south', 'west')[n % 3]},{n % 10},{'ill' if n % 10 > 4 else 'well'}\n" for n in range(120)]
    for site, words in changed.items():
        lines.append(f"{site},{words}\n")
    Path("own.csv").write_text("clinic,x,outcome\n" + "".join(lines))


def test_your_own_file_from_schema_and_job_alone(type_: Type) -> None:
    own_file()
    code, out, _ = type_("check own.toml own.csv")
    assert code == 0
    assert "  west: 40 records count: well 20, ill 20\n" in out
    assert 'inputs = 8 with scale = "marks"' in out
    assert json.loads(type_("check own.toml own.csv --site west --json")[1])["sites"] == {
        "west": {"well": 20, "ill": 20}
    }
    code, out, _ = type_("simulate job.toml --data own.csv --json")
    assert code == 0
    assert sorted(json.loads(out)["sites"]) == ["north", "south", "west"]
    Path("job.toml").write_text(toml(OWN).replace('own.toml"', 'own.toml"\nscale = "marks"'))
    code, _, err = type_("simulate job.toml --data own.csv")
    assert (code, "takes no records of shape (8,): a record gives 8 inputs" in err) == (2, True)
    Path("job.toml").write_text(Path("job.toml").read_text().replace("inputs = 1", "inputs = 8"))
    assert type_("simulate job.toml --data own.csv")[0] == 0


def test_your_own_file_when_it_is_wrong(type_: Type) -> None:
    own_file(north="77.7,well", west="2,gone")
    code, out, err = type_("check own.toml own.csv")
    assert (code, err) == (2, "")
    assert "  north: column x: line 122: '77.7' is not in 0 to 9\n" in out
    assert "  west: column outcome: line 123: 'gone' is no label of the schema" in out
    code, out, err = type_("simulate job.toml --data own.csv")
    assert (code, out) == (2, "")
    assert err == (
        "partway: north: column x: a value outside the range; west: column outcome: an unknown class; "
        "`partway check SCHEMA own.csv` says where\n"
    )
    for line, words in {
        "simulate job.toml": "no records are bundled for own.toml: name a file of all sites' with --data",
        "simulate job.toml --data no.csv": "no.csv: cannot be read (No such file or directory)",
        "check no.toml own.csv": "no.toml: cannot be read",
        "check haert own.csv": "there is no schema `haert`; did you mean `heart`?",
        "data records --set haert": "--set: there is no schema `haert`; did you mean `heart`?",
        "job sign job.toml": "key.pem: cannot be read",
    }.items():
        code, _, err = type_(line)
        assert (code, words in err, err.count("\n")) == (2, True, 1), err
    Path("own.toml").write_text(SCHEMA.replace("unit", "unti"))
    code, _, err = type_("simulate job.toml --data own.csv")
    assert (code, err) == (2, "partway: own.toml: [columns] x: has no key `unti`; did you mean `unit`?\n")
    Path("own.toml").unlink()
    code, _, err = type_("job sign job.toml")
    assert (code, "own.toml: cannot be read" in err) == (2, True)


@pytest.mark.parametrize("line", ["simulate job.toml", "check own.toml own.csv", "data records --set haert"])
def test_wrong_words_wait_for_no_torch(type_: Type, line: str) -> None:
    own_file()
    Path("own.toml").write_text(SCHEMA.replace("unit", "unti"))
    command = f"import sys; from partway import cli; sys.argv = {['partway', *line.split()]}; "
    command += "print(cli.main(), *sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 ")
    assert not {"torch", "grpc", "numpy", "polars"} & set(done.stdout.split())


@pytest.mark.parametrize(("name", "inputs", "scale"), [("heart", 29, "statistics"), ("support", 112, "marks")])
def test_simulate_takes_the_records_of_its_schema(type_: Type, name: str, inputs: int, scale: str) -> None:
    arguments = {"inputs": inputs, "hidden": [8, 4, 8], "classes": 2}
    job = JOB | {"network": JOB["network"] | {"arguments": arguments}, "records": {"schema": name, "scale": scale}}
    Path("job.toml").write_text(toml(job))
    code, out, _ = type_("simulate job.toml --json")
    assert code == 0
    sites = {"heart": ["cleveland", "hungary", "switzerland", "va"], "support": ["support"]}[name]
    assert sorted(json.loads(out)["cost"]) == sorted([*sites, "server"])
    files = json.loads(type_(f"data records --set {name} --json")[1])["files"]
    assert [Path(f).name for f in files] == [f"{site}.csv.gz" for site in sites]


SITE = {
    "site": {"name": "svi", "server": "localhost:1"},
    "data": {"path": "records/svi.csv.gz"},
    "policy": {"networks": ["partway.model.zoo:mlp"], "operators": ["office"], "labels_may_leave": True},
}


def test_preview(type_: Type) -> None:
    assert "records/svi.csv.gz" in json.loads(type_("data records --json")[1])["files"]
    Path("job.toml").write_text(toml(JOB))
    Path("site.toml").write_text(toml(SITE))
    code, out, _ = type_("site preview site.toml job.toml")
    assert code == 0
    assert "activations (bottom -> trunk) to server, in the clear for the receiver: 1 x 32 bytes" in out
    assert "The policy allows it" in out
    first = out
    code, out, _ = type_("site preview site.toml job.toml --json")
    assert "every party hears that 1,313 records train, 239 validate and 835 test\n" in first
    leaves = {row["what"]: row for row in json.loads(out)["leaves"]}
    assert len(leaves["activations (bottom -> trunk)"]["values"]) == 8
    assert len(leaves["labels (data -> trunk)"]["values"]) == 1

    Path("site.toml").write_text(toml(SITE | {"policy": SITE["policy"] | {"labels_may_leave": False}}))
    code, out, _ = type_("site preview site.toml job.toml")
    assert code == 3
    assert "The policy refuses it: " in out
    Path("site.toml").write_text(toml(SITE | {"policy": SITE["policy"] | {"networks": []}}))
    code, _, err = type_("site preview site.toml job.toml")
    assert code == 3
    assert "partway.model.zoo:mlp" in err
    Path("site.toml").write_text(toml(SITE | {"data": {"path": "records/no.csv"}}))
    code, _, err = type_("site preview site.toml job.toml")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = type_("site preview site.toml no.toml")
    assert (code, "no.toml: cannot be read" in err) == (2, True)
    Path("bad.signed").write_bytes(b"nothing")
    code, _, err = type_("site preview site.toml bad.signed")
    assert code == 2


def test_a_preview_of_half_precision_and_clipping(type_: Type) -> None:
    type_("data records")
    training = {"epochs": 1, "batch": 4096, "precision": "bfloat16", "clip_norm": 1.0}
    Path("job.toml").write_text(toml(JOB | {"training": training}))
    Path("site.toml").write_text(toml(SITE | {"site": SITE["site"] | {"name": "a"}}))
    code, out, err = type_("site preview site.toml job.toml")
    assert (code, err) == (0, "")
    assert "activations (bottom -> trunk) to server, in the clear for the receiver: 1 x 16 bytes" in out
    assert "the square of a gradient's norm to server, in the clear for the receiver: 1 x 8 bytes" in out


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"schedule": "private"}, "activations (bottom -> trunk) to server, in the clear for the receiver: 4 x 32"),
        (
            {"schedule": "private", "private": {"personal": "embedding"}},
            "activations (bottom -> stem) to server, in the clear for the receiver: 4 x 32",
        ),
        (
            {"schedule": "half_trained", "half_trained": {"bottoms": "largest"}},
            "state of bottom to another-site, sealed, so that the server forwards and cannot read it: 1 x",
        ),
        (
            {"schedule": "half_trained", "half_trained": {"bottoms": "concatenated"}},
            "activations (bottom:another-site -> shelf) to server, in the clear for the receiver: 2 x",
        ),
        (
            {"semi_supervised": {"alpha": 0.1}},
            "activations (bottom -> trunk) to server, in the clear for the receiver: 1 x 32",
        ),
    ],
)
def test_a_preview_of_each_schedule(type_: Type, training: dict[str, object], told: str) -> None:
    type_("data records")
    Path("job.toml").write_text(toml(JOB | {"training": {"epochs": 1, "batch": 4096, **training}}))
    Path("site.toml").write_text(toml(SITE | {"site": SITE["site"] | {"name": "a"}}))
    code, out, err = type_("site preview site.toml job.toml")
    assert (code, err) == (0, "")
    assert told in out
    assert "decoder" not in out


@pytest.mark.parametrize(
    ("example", "party", "told", "values"),
    [
        ("vertical", "history", "activations (bottom_history -> trunk) to server, in the clear for the receiver", 16),
        ("vertical", "registry", "labels (data_registry -> trunk) to server, in the clear for the receiver", 1),
        ("extended_vanilla", "vitals", "activations (bottom_vitals -> middle) to laboratory, sealed", 16),
        ("extended_vanilla", "laboratory", "activations (middle -> trunk) to server, in the clear for the receiver", 0),
        (
            "multi_task",
            "history",
            "activations (bottom_history -> joined) to server, in the clear",
            16,
        ),
    ],
)
def test_a_preview_of_columns_of_the_same_patients(
    type_: Type, example: str, party: str, told: str, values: int
) -> None:
    """No values of what is made of others' letters."""
    job, records = ROOT / "examples" / f"{example}.toml", ROOT / "src/partway/data/bundled/support.csv.gz"
    site = {"site": {**SITE["site"], "name": party}, "data": {"path": str(records)}}
    Path("site.toml").write_text(toml(SITE | site))
    code, out, err = type_(f"site preview site.toml {job} --json")
    assert (code, err) == (0, "")
    (found,) = (row for row in json.loads(out)["leaves"] if told.startswith(f"{row['what']} to {row['to']}, "))
    assert found["how"].startswith(told.partition(", ")[2])
    assert len(found["values"] or []) == values
    Path("site.toml").write_text(toml(SITE | {"site": {**SITE["site"], "name": "elsewhere"}}))
    code, _, err = type_(f"site preview site.toml {job}")
    assert (code, err) == (2, f"partway: elsewhere has no part in the job {read_job_file(job).job.name}\n")


def test_a_preview_counts_releases_in_jobs_before(type_: Type) -> None:
    type_("data records")
    half = {"schedule": "half_trained", "epochs": 1, "half_trained": {"rounds": 1, "local_epochs": 1}}
    Path("job.toml").write_text(toml(JOB | {"training": half}))
    Path("site.toml").write_text(toml(SITE))
    assert type_("site preview site.toml job.toml")[0] == 0
    Path("runs").mkdir()
    Releases(Path("runs")).note("half", bytes(32))
    code, out, _ = type_("site preview site.toml job.toml")
    assert code == 3
    assert "would have been handed over 2 times; [policy] most_releases is 1" in out


def test_a_site_s_words_are_shown_as_they_stand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Brackets in a message, such as a section of a file, are no markup for the terminal."""

    class Refusing:
        def __init__(self, site: Any, home: Path, say: Any) -> None:
            self._say = say

        async def serve(self, jobs: int | None) -> None:
            self._say(show.Progress("half", "refused", "svi refuses the job: [policy] most_releases is 1"))

    monkeypatch.setattr(show, "Agent", Refusing)
    header = SiteHeader(name="svi", server="localhost:1")
    show.run(Site(site=header, data=Connection(path="x"), policy=Policy()), Path(), None, as_json=False)
    assert "[policy] most_releases is 1" in capsys.readouterr().out


def test_plan_shows_every_place_and_draws_it(type_: Type) -> None:
    Path("job.toml").write_text(toml(JOB))
    code, out, _ = type_("plan job.toml")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "float32[64]" not in out
    (cut,) = [line for line in out.splitlines() if line.startswith("> ")]
    assert cut.split() == [">", "hidden.2", "float32[8]", "0.03", "0.03", "0.28", "64.6", "70.2"]
    assert lines["bottom:"].split() == ["bottom:", "each", "site"]
    assert Path("job.png").read_bytes().startswith(b"\x89PNG")
    network = {"build": "partway.model.zoo:resnet", "arguments": {"channels": 1, "filters": [4], "classes": 10}}
    images = JOB | {"network": network | {"cut": ["blocks.0.first"]}, "records": {"schema": "mnist"}}
    Path("job.toml").write_text(toml(images))
    code, out, _ = type_("plan job.toml --json --to there.png")
    told = json.loads(out)
    assert (code, told["picture"], told["batchnorm"]) == (0, "there.png", None)
    (here,) = [place for place in told["places"] if place["job_cuts_here"]]
    assert [value["shape"] for value in here["crosses"]] == [[4, 28, 28], [4, 14, 14]]
    assert here["bytes_up"] == 4 * (4 * 28 * 28 + 4 * 14 * 14)
    Path("job.toml").write_text(toml(JOB | {"network": JOB["network"] | {"cut": ["hidden.9"]}}))
    assert "The job cuts after `hidden.9`, which is no place." in type_("plan job.toml")[1]
    assert type_("simulate job.toml")[2].startswith("partway: the network has no module `hidden.9`; did you mean")


def test_a_segment_is_written_signed_and_shown(type_: Type, office: str) -> None:
    Path("job.toml").write_text(toml(JOB))
    code, out, _ = type_("segment write job.toml bottom --identity office --json")
    assert code == 0
    told = json.loads(out)
    assert told["folder"] == f"weights/{told['digest']}"
    Path(told["folder"]).rename("bottom")
    code, out, _ = type_("segment show bottom --identity office")
    assert told["digest"] in out
    assert (code, out.splitlines()[0]) == (0, "Signed by office, an operator of this federation.")
    assert "It does 2 x dense layer, and 1 smaller steps; 1,224 numbers are trained, 0 fixed." in out
    assert "WARNING" not in out
    file = Path("bottom/segment.json")
    file.write_bytes(file.read_bytes() + b" ")
    code, _, err = type_("segment show bottom --identity office")
    assert (code, err) == (2, "partway: the segment was altered after office had signed it\n")
    code, _, err = type_("segment write job.toml head --identity office")
    assert (code, err) == (2, "partway: thyroid has no segment head; it has bottom, trunk\n")
    Path("bottom/segment.sig").write_bytes(b"x")
    assert "the segment's signature is none" in type_("segment show bottom --identity office")[2]


def test_weights_of_elsewhere_are_divided(type_: Type) -> None:
    Path("job.toml").write_text(toml(JOB))
    shapes = {"hidden.0": (32, 29), "hidden.2": (8, 32), "hidden.4": (32, 8), "output": (7, 32)}
    tensors = {f"{n}.weight": torch.ones(shape) / 30 for n, shape in shapes.items()}
    save_file(tensors, "network.safetensors")
    code, out, _ = type_("weights job.toml network.safetensors --without output")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("bottom: 2 tensors, 2 drawn anew: weights/")
    assert lines[1].startswith("trunk: 1 tensors, 3 drawn anew: weights/")
    Path("job.toml").write_text(toml(JOB) + "\n" + "\n".join(lines[4:]) + "\n")
    assert type_("simulate job.toml")[0] == 0
    code, _, err = type_("simulate job.toml --weights elsewhere")
    assert code == 3
    assert ".safetensors into elsewhere" in err
