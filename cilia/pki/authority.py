"""An authority of our own: makes, issues and rotates certificates.

Keys are of the curve P-256, certificates X.509 v3 (RFC 5280). Files are written beside and renamed
into place, the key before the certificate; a reader that meets a key and a certificate that do not
belong together keeps what it has (files.py).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cilia.errors import ConflictError, InvalidError, NotFoundError, PreconditionError
from cilia.pki.files import CertificateInfo, describe, read_certificates

CA_DAYS: Final = 3650
DAYS: Final = 90
TRUST_DOMAIN: Final = "cilia"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_BACKDATED: Final = dt.timedelta(minutes=5)  # clocks of nodes differ


class NoAuthority(NotFoundError):
    default_cure = "Make one: cilia cert init"


class AuthorityExists(ConflictError):
    default_cure = "Renew it with cilia cert rotate --ca, or choose another --dir"


class CertificateRequestInvalid(InvalidError):
    """A name that cannot be in a certificate."""


class AuthorityUnusable(PreconditionError):
    """Its files are damaged, or cannot be read or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a certificate is to say. `names` are DNS names or addresses."""

    node: str
    service: str
    names: tuple[str, ...] = ()
    days: int = DAYS

    @property
    def directory(self) -> str:
        return f"{self.node}-{self.service}"

    @property
    def uri(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/node/{self.node}/{self.service}"

    def check(self) -> None:
        """Raises CertificateRequestInvalid."""
        for what, text in (("node", self.node), ("service", self.service)):
            if not _NAME.fullmatch(text):
                raise CertificateRequestInvalid(
                    f"{text!r} cannot be the name of a {what}",
                    cure="Use lower case letters, digits, dots, dashes and underscores, at most 63",
                )
        if not 1 <= self.days <= CA_DAYS:
            raise CertificateRequestInvalid(f"{self.days} days is outside 1 to {CA_DAYS}")
        for name in self.names:
            _general_name(name)


class Authority:
    """The authority in a directory. Raises AuthorityUnusable for what the file system refuses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def _certificate(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def _key(self) -> Path:
        return self.directory / "ca.key"

    def init(self, *, days: int = CA_DAYS) -> CertificateInfo:
        """Makes the authority. Raises AuthorityExists."""
        with _explained(self.directory):
            self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            with self._locked():
                if self._key.exists() or self._certificate.exists():
                    raise AuthorityExists(f"there is an authority in {self.directory} already")
                key, certificate = _self_signed(days)
                _write(self._key, _pem_of_key(key), 0o600)
                _write(self._certificate, _pem(certificate), 0o644)
        return describe(self._certificate)

    def issue(self, request: Request) -> CertificateInfo:
        """Makes a certificate, or makes it anew. Raises NoAuthority, CertificateRequestInvalid."""
        request.check()
        with _explained(self.directory), self._locked():
            return self._issue(request)

    def issued(self) -> list[CertificateInfo]:
        """What is in the directory, the authority first."""
        with _explained(self.directory):
            if not self._certificate.exists():
                raise NoAuthority(f"there is no authority in {self.directory}")
            paths = [self._certificate, *sorted(self.directory.glob("*/tls.crt"))]
        return [describe(path) for path in paths]

    def rotate(
        self, names: Sequence[str] = (), *, within_days: float | None = None, ca: bool = False
    ) -> list[CertificateInfo]:
        """Issues again what was issued, with the same names: those named, or all; with
        `within_days` those only that end by then.

        With `ca` the authority gets a new key first. Its old certificate stays trusted for as long
        as it is valid, so that holders of old and new certificates meet while the new ones spread.
        """
        with _explained(self.directory), self._locked():
            if ca:
                self._rotate_ca()
            renewed = []
            known = {path.parent.name: path for path in self.directory.glob("*/tls.crt")}
            for name in names:
                if name not in known:
                    raise NotFoundError(
                        f"no certificate {name} was issued in {self.directory}",
                        cure="cilia cert list shows those that were",
                    )
            now = dt.datetime.now(dt.UTC)
            for name in sorted(names or known):
                certificate = read_certificates(known[name])[0]
                left = certificate.not_valid_after_utc - now
                if within_days is not None and not ca and left > dt.timedelta(days=within_days):
                    continue
                renewed.append(self._issue(_request_of(certificate)))
        return renewed

    def _issue(self, request: Request) -> CertificateInfo:
        ca_key, ca = self._load()
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        alternatives = [x509.UniformResourceIdentifier(request.uri)]
        alternatives += [_general_name(name) for name in request.names]  # type: ignore[misc]  # all are GeneralNames
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(f"{request.service}.{request.node}"[:64]))
            .issuer_name(ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(min(now + dt.timedelta(days=request.days), ca.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(_authority_identifier(ca), critical=False)
        )
        certificate = builder.sign(ca_key, hashes.SHA256())
        directory = self.directory / request.directory
        directory.mkdir(mode=0o755, exist_ok=True)
        _write(directory / "ca.crt", self._certificate.read_bytes(), 0o644)
        _write(directory / "tls.key", _pem_of_key(key), 0o600)
        _write(directory / "tls.crt", _pem(certificate), 0o644)
        return describe(directory / "tls.crt")

    def _rotate_ca(self) -> None:
        _, old = self._load()
        now = dt.datetime.now(dt.UTC)
        trusted = [c for c in read_certificates(self._certificate) if c.not_valid_after_utc > now]
        key, certificate = _self_signed((old.not_valid_after_utc - old.not_valid_before_utc).days)
        bundle = b"".join(map(_pem, [certificate, *trusted[:4]]))
        # Trusted before it signs: a crash in between leaves an authority that can still be read.
        _write(self.directory / "ca.key.next", _pem_of_key(key), 0o600)
        _write(self._certificate, bundle, 0o644)
        (self.directory / "ca.key.next").replace(self._key)

    def _load(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        if not self._key.exists() or not self._certificate.exists():
            raise NoAuthority(f"there is no authority in {self.directory}")
        upcoming = self.directory / "ca.key.next"
        certificates = read_certificates(self._certificate)
        for path in (self._key, upcoming):
            if not path.exists():
                continue
            try:
                key = serialization.load_pem_private_key(path.read_bytes(), None)
            except ValueError as error:
                raise AuthorityUnusable(f"{path} is not a private key: {error}") from error
            for certificate in certificates:
                if certificate.public_key() == key.public_key():
                    assert isinstance(key, ec.EllipticCurvePrivateKey)
                    return key, certificate
        raise AuthorityUnusable(
            f"{self._key} is not the key of any certificate in {self._certificate}",
            cure="Restore the file that belongs to it, or make a new authority elsewhere",
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time."""
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NoAuthority(f"there is no authority in {directory}") from error
    except OSError as error:
        raise AuthorityUnusable(
            f"cannot use {error.filename or directory}: {error.strerror}",
            cure="Run as root, or choose another --dir",
        ) from error


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.removeprefix("*.").rstrip(".").split(".")
    if len(text) > 253 or not all(
        re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?", label) for label in labels
    ):
        raise CertificateRequestInvalid(f"{text[:80]!r} is neither a DNS name nor an address")
    return x509.DNSName(text.rstrip(".").lower())


def _request_of(certificate: x509.Certificate) -> Request:
    """What a certificate of ours says. Raises CertificateRequestInvalid for one of others."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise CertificateRequestInvalid("the certificate names nobody") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    for uri in uris:
        match uri.split("/"):
            case ["spiffe:", "", _, "node", node, service]:
                others = [
                    *names.get_values_for_type(x509.DNSName),
                    *map(str, names.get_values_for_type(x509.IPAddress)),
                ]
                days = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days
                return Request(node=node, service=service, names=tuple(others), days=max(days, 1))
            case _:
                continue
    raise CertificateRequestInvalid("the certificate was not issued by cilia cert")


def _self_signed(days: int) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    # A name of its own for each: chains are built by subject and key identifier.
    subject = _subject(f"Cilia CA {now:%Y-%m-%d %H:%M:%S.%f}")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _authority_identifier(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value)


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cilia"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Durably and all at once; the key is never readable by others, not for a moment."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
