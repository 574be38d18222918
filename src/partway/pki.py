"""The federation's certificates: the steward's authority, requests, roles, and signed jobs.

The steward holds the authority on a machine of their own, never the server's operator. A party makes its own key, asks
with a request, and gets a certificate of one role. A job is signed by its operator; whoever changes a byte of it
breaks the signature.

>>> steward = Authority.create("study")
>>> office = steward.admit("study-office", Role.OPERATOR)
>>> signed = sign_job(office, b"[job]\\nname = 'thyroid'")
>>> open_job(signed, steward.pem).operator.name
'study-office'
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, cast

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Meta

from partway.config import contents
from partway.errors import TrustError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_AUTHORITY_DAYS, _PARTY_DAYS = 3650, 1095


class Role(Enum):
    """What a certificate's holder may do; it stands in the certificate and is checked at each call."""

    SITE = "site"
    """Opens a stream to the server and takes part in jobs."""
    SERVER = "server"
    OPERATOR = "operator"
    """Signs, submits, stops and downloads jobs."""

    def __str__(self) -> str:
        return f"an {self.value}" if self is Role.OPERATOR else f"a {self.value}"


@dataclass(frozen=True)
class Subject:
    """Whose certificate it is, after the authority's signature, its dates and its role have been checked."""

    name: str
    role: Role
    key_der: bytes
    """SubjectPublicKeyInfo."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key, as rosters and policies have it."""
        return hashlib.sha256(self.key_der).hexdigest()


@dataclass(frozen=True)
class Identity:
    """A party's own key and certificate, and the authority that it trusts."""

    key_pem: bytes
    certificate_pem: bytes
    authority_pem: bytes

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """From `key.pem`, `certificate.pem` and `authority.pem`. Raises `TrustError` if they do not belong together."""
        key, certificate, authority = (contents(folder / f"{n}.pem") for n in ("key", "certificate", "authority"))
        identity = cls(key, certificate, authority)
        if identity.subject.key_der != _public_der(identity._key.public_key()):
            raise TrustError(f"{folder}: certificate.pem was not made for key.pem; ask the steward for the right one")
        return identity

    @cached_property
    def subject(self) -> Subject:
        return verify_certificate(self.certificate_pem, self.authority_pem)

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def fingerprint(self) -> str:
        return self.subject.fingerprint

    @property
    def key_der(self) -> bytes:
        return self.subject.key_der

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        return _private(self.key_pem, "key.pem")

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


@dataclass(frozen=True)
class Request:
    """What a party asks the steward for."""

    name: str
    role: Role
    hosts: tuple[str, ...]
    """Names and addresses at which a server is reached."""
    fingerprint: str


class Authority:
    """The steward's: whoever holds its key can make any party."""

    def __init__(self, key_pem: bytes, pem: bytes) -> None:
        self.key_pem, self.pem = key_pem, pem
        self._key, self._certificate = _private(key_pem, "authority.key"), _certificate(pem, "authority.pem")

    @classmethod
    def create(cls, name: str) -> Authority:
        """A new key and its own certificate, for ten years."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{_checked(name)} authority")])
        builder = (
            _builder(subject, subject, key.public_key(), _AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        certificate = builder.sign(key, hashes.SHA256())
        return cls(_pem(key), certificate.public_bytes(serialization.Encoding.PEM))

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """From a folder that `save` wrote."""
        return cls(contents(folder / "authority.key"), contents(folder / "authority.pem"))

    def save(self, folder: Path) -> None:
        """Writes `authority.key`, for the steward alone, and `authority.pem`, for every party. Never overwrites."""
        _write_new(folder / "authority.key", self.key_pem, private=True)
        _write_new(folder / "authority.pem", self.pem)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(_public_der(self._key.public_key())).hexdigest()

    def approve(self, request: bytes) -> bytes:
        """The certificate that a request asks for, PEM. Its fingerprint must have been compared with the party."""
        asked = read_request(request)
        signing_request = x509.load_pem_x509_csr(request)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if asked.role is Role.SERVER else ExtendedKeyUsageOID.CLIENT_AUTH
        key = cast(ec.EllipticCurvePublicKey, signing_request.public_key())
        builder = (
            _builder(_subject(asked.name, asked.role), self._certificate.subject, key, _PARTY_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if asked.role is Role.SERVER:  # no other party may pass for a host
            builder = builder.add_extension(_alternatives(asked.hosts), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def admit(self, name: str, role: Role, hosts: Sequence[str] = ()) -> Identity:
        """Key, request and certificate in one: for tests and simulations, where one process is everybody."""
        key, request = make_request(name, role, hosts)
        return Identity(key, self.approve(request), self.pem)


def make_request(name: str, role: Role, hosts: Sequence[str] = ()) -> tuple[bytes, bytes]:
    """A new key, PEM, and a request for a certificate of one role, PEM."""
    if role is Role.SERVER and not hosts:
        raise UsageError("a server's request names the hosts at which sites reach it")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(_checked(name), role))
    if hosts:
        builder = builder.add_extension(_alternatives(hosts), critical=False)
    request = builder.sign(key, hashes.SHA256())
    return _pem(key), request.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> Request:
    """What a request asks for. Raises `TrustError` if it is damaged, or its key did not sign it."""
    try:
        request = x509.load_pem_x509_csr(pem)
        sound = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm):
        raise TrustError("this is no request for a certificate; make one with `partway site request`") from None
    key = request.public_key()
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("the request is damaged, or its key is not P-256; make a new one")
    name, role = _name_and_role(request.subject)
    fingerprint = hashlib.sha256(_public_der(key)).hexdigest()
    return Request(name, role, _hosts(request.extensions), fingerprint)


def verify_certificate(pem: bytes, authority_pem: bytes) -> Subject:
    """Whose certificate this is. Raises `TrustError` if it is of another federation, or out of date."""
    certificate, authority = _certificate(pem, "the certificate"), _certificate(authority_pem, "authority.pem")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError("the certificate is of another federation: another authority has signed it") from None
    name, role = _name_and_role(certificate.subject)
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        until = certificate.not_valid_after_utc.date()
        raise TrustError(f"{name}'s certificate is not valid today (until {until}); ask the steward for a new one")
    return Subject(name, role, _public_der(certificate.public_key()))


def signed_by(key_der: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the key made the signature over `data`."""
    try:
        key = serialization.load_der_public_key(key_der)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def spoken(fingerprint: str) -> str:
    """A fingerprint as it is read out by telephone.

    >>> spoken("0123456789abcdef" * 4)
    '0123 4567 89ab cdef 0123 4567 89ab cdef 0123 4567 89ab cdef 0123 4567 89ab cdef'
    """
    return " ".join(fingerprint[i : i + 4] for i in range(0, len(fingerprint), 4))


# -- jobs


_LONGEST = 2**17


class _SignedJob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    toml: Annotated[bytes, Meta(max_length=_LONGEST)]
    schema: Annotated[bytes, Meta(max_length=_LONGEST)]
    """Empty where the job names a bundled schema."""
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    certificate: Annotated[bytes, Meta(max_length=2**14)]
    signature: Annotated[bytes, Meta(max_length=80)]


@dataclass(frozen=True)
class OpenedJob:
    """A job as its operator signed it."""

    toml: bytes
    schema: bytes
    """The text of the schema file that the job names; empty where it names a bundled one."""
    operator: Subject
    digest: bytes
    """32 bytes that stand for this job from now on; signed again, the same words have another one."""


def sign_job(identity: Identity, toml: bytes, schema: bytes = b"") -> bytes:
    """The job's words, and its schema's, with the operator's certificate and signature.

    Raises:
        TrustError: it is no operator.
        UsageError: a text is too long.
    """
    if identity.subject.role is not Role.OPERATOR:
        raise TrustError(f"{identity.name} is {identity.subject.role}; only operators sign jobs")
    if max(len(toml), len(schema)) > _LONGEST:
        raise UsageError(f"a job and its schema have at most {_LONGEST:,} bytes each")
    nonce = os.urandom(16)
    job = _SignedJob(toml, schema, nonce, identity.certificate_pem, identity.sign(_digest(nonce, toml, schema)))
    return msgspec.msgpack.encode(job)


def open_job(signed: bytes, authority_pem: bytes) -> OpenedJob:
    """The words of a signed job. Raises `TrustError` if it was altered, or no operator of this federation signed it."""
    try:
        job = msgspec.msgpack.decode(signed, type=_SignedJob)
    except msgspec.MsgspecError:
        raise TrustError("this is no signed job; make one with `partway job sign`") from None
    operator = verify_certificate(job.certificate, authority_pem)
    if operator.role is not Role.OPERATOR:
        raise TrustError(f"the job is signed by {operator.name}, {operator.role}; only operators sign jobs")
    digest = _digest(job.nonce, job.toml, job.schema)
    if not signed_by(operator.key_der, job.signature, digest):
        raise TrustError(f"the job was altered after {operator.name} had signed it")
    return OpenedJob(job.toml, job.schema, operator, digest)


def _digest(nonce: bytes, toml: bytes, schema: bytes) -> bytes:
    return hashlib.sha256(b"partway/job/v1\0" + nonce + len(toml).to_bytes(8, "little") + toml + schema).digest()


class _SegmentSignature(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    certificate: bytes
    signature: bytes


def sign_segment(identity: Identity, program: bytes) -> bytes:
    """An operator's certificate and signature of a segment's program. Raises `TrustError` if it is no operator."""
    if identity.subject.role is not Role.OPERATOR:
        raise TrustError(f"{identity.name} is {identity.subject.role}; only operators sign segments")
    made = _SegmentSignature(identity.certificate_pem, identity.sign(_SEGMENT + program))
    return msgspec.msgpack.encode(made)


def segment_signer(signature: bytes, program: bytes, authority_pem: bytes) -> Subject:
    """Who signed a segment's program. Raises `TrustError` if it was altered, or no operator of this federation did."""
    try:
        made = msgspec.msgpack.decode(signature, type=_SegmentSignature)
    except msgspec.MsgspecError:
        raise TrustError(
            "the segment's signature is none; an operator makes one with `partway segment write`"
        ) from None
    operator = verify_certificate(made.certificate, authority_pem)
    if operator.role is not Role.OPERATOR:
        raise TrustError(f"the segment is signed by {operator.name}, {operator.role}; only operators sign segments")
    if not signed_by(operator.key_der, made.signature, _SEGMENT + program):
        raise TrustError(f"the segment was altered after {operator.name} had signed it")
    return operator


_SEGMENT = b"partway/segment/v1\0"


# -- parties' folders


def request_in(folder: Path, name: str, role: Role, hosts: Sequence[str] = ()) -> Request:
    """Makes a party's key and request in a folder, which it creates. Never overwrites a key."""
    key, request = make_request(name, role, hosts)
    _write_new(folder / "key.pem", key, private=True)
    _write_new(folder / "request.pem", request)
    return read_request(request)


def approve_in(folder: Path, request: Path) -> Request:
    """The steward approves: writes `certificate.pem` and `authority.pem` beside the request, and keeps a copy.

    Raises:
        TrustError: another key has been approved under this name.
    """
    authority, pem = Authority.load(folder), contents(request)
    asked = read_request(pem)
    kept = folder / "approved" / f"{asked.name}.pem"
    if kept.exists() and verify_certificate(contents(kept), authority.pem).fingerprint != asked.fingerprint:
        raise TrustError(f"{asked.name} has a certificate for another key; remove {kept} if it is to be replaced")
    certificate = authority.approve(pem)
    for path, data in ((kept, certificate), (request.parent / "certificate.pem", certificate)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (request.parent / "authority.pem").write_bytes(authority.pem)
    return asked


def approved_sites(folder: Path) -> dict[str, str]:
    """Key fingerprints of the sites that the steward has approved, by name."""
    authority = Authority.load(folder)
    subjects = [
        verify_certificate(contents(path), authority.pem) for path in sorted((folder / "approved").glob("*.pem"))
    ]
    return {subject.name: subject.fingerprint for subject in subjects if subject.role is Role.SITE}


# -- parts


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name: letters, digits, _ and -, at most 64, the first a letter or digit")
    return name


def _subject(name: str, role: Role) -> x509.Name:
    parts = ((NameOID.COMMON_NAME, name), (NameOID.ORGANIZATIONAL_UNIT_NAME, role.value))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def _name_and_role(subject: x509.Name) -> tuple[str, Role]:
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    roles = subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    known = {role.value: role for role in Role}
    if len(names) != 1 or len(roles) != 1 or roles[0].value not in known or not _NAME.fullmatch(str(names[0].value)):
        raise TrustError("the certificate or request does not name one party and its role")
    return str(names[0].value), known[str(roles[0].value)]


def _alternatives(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    def one(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    return x509.SubjectAlternativeName([one(host) for host in hosts])


def _hosts(extensions: x509.Extensions) -> tuple[str, ...]:
    try:
        found = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in found)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(pem: bytes, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise TrustError(f"{what} is no certificate in PEM") from None


def _private(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TrustError(f"{what} is no private key in PEM without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{what} is not a P-256 key")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    format_ = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, format_, serialization.NoEncryption())


def _public_der(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TrustError("a certificate's key is not P-256")
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write_new(path: Path, data: bytes, private: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except FileExistsError:
        raise UsageError(f"{path} exists and is not overwritten; remove it, or choose another folder") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
