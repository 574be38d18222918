"""Certificates, roles and signed jobs; and each way in which they can be wrong."""

from __future__ import annotations

import contextlib
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from partway import pki
from partway.errors import TrustError, UsageError
from partway.pki import Authority, Identity, Role, open_job, sign_job, verify_certificate

TOML = b"[job]\nname = 'thyroid'\n"


@pytest.fixture(scope="module")
def steward() -> Authority:
    return Authority.create("study")


@pytest.fixture(scope="module")
def other() -> Authority:
    return Authority.create("study")


def test_a_certificate_names_party_role_and_key(steward: Authority) -> None:
    key, request = pki.make_request("svi", Role.SITE)
    identity = Identity(key, steward.approve(request), steward.pem)
    assert (identity.name, identity.subject.role) == ("svi", Role.SITE)
    assert identity.fingerprint == pki.read_request(request).fingerprint
    assert pki.signed_by(identity.key_der, identity.sign(b"words"), b"words")
    assert not pki.signed_by(identity.key_der, identity.sign(b"words"), b"other words")
    assert not pki.signed_by(steward.admit("svi", Role.SITE).key_der, identity.sign(b"words"), b"words")
    assert not pki.signed_by(b"nonsense", identity.sign(b"words"), b"words")


def test_another_federation(steward: Authority, other: Authority) -> None:
    identity = other.admit("svi", Role.SITE)
    with pytest.raises(TrustError, match="of another federation"):
        verify_certificate(identity.certificate_pem, steward.pem)


def test_the_authority_itself_is_no_party(steward: Authority) -> None:
    with pytest.raises(TrustError, match="does not name one party"):
        verify_certificate(steward.pem, steward.pem)


def test_a_party_cannot_make_parties(steward: Authority) -> None:
    site = steward.admit("svi", Role.SITE)
    forged = Authority(site.key_pem, site.certificate_pem).admit("server", Role.SERVER, ["localhost"])
    with pytest.raises(TrustError, match="of another federation"):
        verify_certificate(forged.certificate_pem, steward.pem)


def test_out_of_date(steward: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = steward.admit("svi", Role.SITE)

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) + timedelta(days=1096)

    monkeypatch.setattr(pki, "datetime", Later)
    with pytest.raises(TrustError, match="not valid today"):
        verify_certificate(identity.certificate_pem, steward.pem)


@pytest.mark.parametrize("name", ["", "-svi", "sv i", "sv/i", "../svi", "ä", "a" * 65])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="is no name"):
        pki.make_request(name, Role.SITE)


def test_only_a_server_s_certificate_names_hosts(steward: Authority) -> None:
    _, request = pki.make_request("svi", Role.SITE, ["partway.example.org"])
    assert pki._certificate(steward.approve(request), "").extensions.__len__() == 3
    _, request = pki.make_request("server", Role.SERVER, ["partway.example.org", "192.0.2.1"])
    assert pki.read_request(request).hosts == ("partway.example.org", "192.0.2.1")
    assert pki._hosts(pki._certificate(steward.approve(request), "").extensions) == (
        "partway.example.org",
        "192.0.2.1",
    )
    with pytest.raises(UsageError, match="names the hosts"):
        pki.make_request("server", Role.SERVER)


def test_a_damaged_request() -> None:
    _, request = pki.make_request("svi", Role.SITE)
    body = request.splitlines()
    body[2] = body[2][:10] + (b"A" if body[2][10:11] != b"A" else b"B") + body[2][11:]
    for damaged in (b"", b"nonsense", b"\n".join(body)):
        with pytest.raises(TrustError, match="request"):
            pki.read_request(damaged)


# -- jobs


def test_a_signed_job_opens_to_its_words(steward: Authority) -> None:
    office = steward.admit("study-office", Role.OPERATOR)
    signed = sign_job(office, TOML)
    opened = open_job(signed, steward.pem)
    assert (opened.toml, opened.operator) == (TOML, office.subject)
    assert open_job(signed, steward.pem).digest == opened.digest
    assert open_job(sign_job(office, TOML), steward.pem).digest != opened.digest


def test_every_byte_of_a_signed_job_counts(steward: Authority) -> None:
    """Altered anywhere, it does not open, or is the same job: ECDSA has a second signature for the same words."""
    signed = sign_job(steward.admit("study-office", Role.OPERATOR), TOML)
    digest = open_job(signed, steward.pem).digest
    for at in range(0, len(signed), 3):
        altered = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]
        with contextlib.suppress(TrustError):
            assert open_job(altered, steward.pem).digest == digest


def test_altered_after_signing(steward: Authority) -> None:
    signed = sign_job(steward.admit("study-office", Role.OPERATOR), TOML)
    with pytest.raises(TrustError, match="was altered after study-office had signed it"):
        open_job(signed.replace(b"thyroid", b"other  "), steward.pem)


def test_the_schema_is_signed_with_the_job(steward: Authority) -> None:
    office = steward.admit("study-office", Role.OPERATOR)
    signed = sign_job(office, TOML, b"[schema]")
    assert open_job(signed, steward.pem).schema == b"[schema]"
    assert open_job(sign_job(office, TOML), steward.pem).schema == b""
    with pytest.raises(TrustError, match="was altered"):
        open_job(signed.replace(b"[schema]", b"[schemb]"), steward.pem)
    parts = msgspec.msgpack.decode(signed)
    parts[:2] = [parts[0] + parts[1], b""]  # the same bytes, cut elsewhere
    with pytest.raises(TrustError, match="was altered"):
        open_job(msgspec.msgpack.encode(parts), steward.pem)
    with pytest.raises(UsageError, match="at most 131,072 bytes each"):
        sign_job(office, TOML, bytes(2**17 + 1))


def test_only_operators_sign(steward: Authority, other: Authority) -> None:
    site = steward.admit("svi", Role.SITE)
    with pytest.raises(TrustError, match="svi is a site; only operators sign"):
        sign_job(site, TOML)
    office = steward.admit("study-office", Role.OPERATOR)
    parts = msgspec.msgpack.decode(sign_job(office, TOML))
    parts[3] = site.certificate_pem
    with pytest.raises(TrustError, match="signed by svi, a site"):
        open_job(msgspec.msgpack.encode(parts), steward.pem)
    with pytest.raises(TrustError, match="of another federation"):
        open_job(sign_job(other.admit("study-office", Role.OPERATOR), TOML), steward.pem)


@pytest.mark.parametrize("data", [b"", b"[job]", msgspec.msgpack.encode([b"", b"", b"", b""])])
def test_no_signed_job(steward: Authority, data: bytes) -> None:
    with pytest.raises(TrustError, match="no signed job"):
        open_job(data, steward.pem)


# -- folders


def test_from_request_to_identity(tmp_path: Path, steward: Authority) -> None:
    steward.save(tmp_path / "authority")
    asked = pki.request_in(tmp_path / "svi", "svi", Role.SITE)
    assert pki.approve_in(tmp_path / "authority", tmp_path / "svi" / "request.pem") == asked
    identity = Identity.load(tmp_path / "svi")
    assert identity.fingerprint == asked.fingerprint
    for key in (tmp_path / "authority" / "authority.key", tmp_path / "svi" / "key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_keys_are_never_overwritten(tmp_path: Path, steward: Authority) -> None:
    steward.save(tmp_path)
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        steward.save(tmp_path)
    pki.request_in(tmp_path, "svi", Role.SITE)
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        pki.request_in(tmp_path, "svi", Role.SITE)


def test_a_second_key_under_the_same_name(tmp_path: Path, steward: Authority) -> None:
    steward.save(tmp_path / "authority")
    for folder in ("one", "two"):
        pki.request_in(tmp_path / folder, "svi", Role.SITE)
    pki.approve_in(tmp_path / "authority", tmp_path / "one" / "request.pem")
    pki.approve_in(tmp_path / "authority", tmp_path / "one" / "request.pem")
    with pytest.raises(TrustError, match="svi has a certificate for another key"):
        pki.approve_in(tmp_path / "authority", tmp_path / "two" / "request.pem")


def test_files_that_do_not_belong_together(tmp_path: Path, steward: Authority) -> None:
    one, two = steward.admit("svi", Role.SITE), steward.admit("svi", Role.SITE)
    (tmp_path / "key.pem").write_bytes(one.key_pem)
    (tmp_path / "certificate.pem").write_bytes(two.certificate_pem)
    (tmp_path / "authority.pem").write_bytes(steward.pem)
    with pytest.raises(TrustError, match=r"certificate\.pem was not made for key\.pem"):
        Identity.load(tmp_path)
    (tmp_path / "key.pem").unlink()
    with pytest.raises(UsageError, match=r"key\.pem: cannot be read"):
        Identity.load(tmp_path)
