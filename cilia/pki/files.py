"""The certificate that a service holds: read from its directory, and again when it was renewed.

    tls.crt, tls.key, ca.crt ─▶ Credentials.current() ─▶ gRPC, at every handshake

The files are looked at when they are needed, so a renewed certificate is in use with the next
connection, and no connection ends. Files that cannot be used (a key that does not belong to the
certificate, for it is being written) leave the last good ones in force.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cilia.errors import PreconditionError

MAX_FILE_BYTES: Final = 1 << 20
_SPIFFE: Final = "spiffe://"


class CertificateUnusable(PreconditionError):
    """The files cannot be used."""

    default_cure = "Issue it anew: cilia cert issue"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateInfo:
    """What a certificate says. `error` set: it could not be read."""

    path: Path
    subject: str = ""
    issuer: str = ""
    names: tuple[str, ...] = ()
    not_before: dt.datetime | None = None
    not_after: dt.datetime | None = None
    serial: str = ""
    is_ca: bool = False
    error: str = ""

    def days_left(self, now: dt.datetime | None = None) -> float:
        if self.not_after is None:
            return 0.0
        return (self.not_after - (now or dt.datetime.now(dt.UTC))).total_seconds() / 86_400


@dataclass(frozen=True, slots=True)
class KeyPair:
    """PEM, as gRPC takes it."""

    key: bytes
    chain: bytes
    roots: bytes


class Credentials:
    """The certificate in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.error = ""
        """Why the files of now are not in use; "" when they are."""
        self._seen: tuple[tuple[int, int, int], ...] = ()
        self._current: KeyPair | None = None

    def current(self) -> KeyPair:
        """The newest usable ones. Raises CertificateUnusable when there never were any."""
        try:
            seen = tuple(self._stamp(name) for name in ("tls.crt", "tls.key", "ca.crt"))
            if seen != self._seen or self._current is None:
                self._current = self._load()
                self._seen, self.error = seen, ""
        except (CertificateUnusable, OSError) as error:
            text = error.message if isinstance(error, CertificateUnusable) else str(error)
            self.error = text
            if self._current is None:
                if isinstance(error, CertificateUnusable):
                    raise
                raise CertificateUnusable(f"cannot read the certificate: {text}") from error
        return self._current

    def info(self) -> CertificateInfo:
        return describe(self.directory / "tls.crt", error=self.error)

    def _stamp(self, name: str) -> tuple[int, int, int]:
        status = (self.directory / name).stat()
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _load(self) -> KeyPair:
        chain = _read(self.directory / "tls.crt")
        key = _read(self.directory / "tls.key")
        roots = _read(self.directory / "ca.crt")
        certificate = _parse(self.directory / "tls.crt", chain)[0]
        _parse(self.directory / "ca.crt", roots)
        try:
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError) as error:
            raise CertificateUnusable(
                f"{self.directory / 'tls.key'} is not a private key without a passphrase"
            ) from error
        if private.public_key() != certificate.public_key():
            raise CertificateUnusable(f"the key in {self.directory} is not the certificate's")
        if certificate.not_valid_after_utc < dt.datetime.now(dt.UTC):
            raise CertificateUnusable(
                f"the certificate in {self.directory} has ended on "
                f"{certificate.not_valid_after_utc:%Y-%m-%d}",
                cure="Renew it: cilia cert rotate",
            )
        return KeyPair(key, chain, roots)


def identity_of(names: tuple[str, ...]) -> tuple[str, str]:
    """(node, service) of a peer from the names in its certificate; ("", "") when there are none.

    `names` are what TLS reports: URIs and DNS names. A certificate of ours says both in a SPIFFE
    URI. Of one that another authority issued and the operator trusts, the last part of its SPIFFE
    path, or else its first DNS name, is the node.
    """
    for name in names:
        if name.startswith(_SPIFFE):
            _, *path = name.removeprefix(_SPIFFE).split("/")
            match path:
                case ["node", node, service]:
                    return node, service
                case [*_, last] if last:
                    return last, ""
    for name in names:
        if name and "://" not in name:
            return name, ""
    return "", ""


def describe(path: Path, *, error: str = "") -> CertificateInfo:
    """Never raises for what the file holds: that is told in `error`."""
    try:
        certificate = read_certificates(path)[0]
    except (CertificateUnusable, OSError) as problem:
        text = problem.message if isinstance(problem, CertificateUnusable) else str(problem)
        return CertificateInfo(path=path, error=error or text)
    return CertificateInfo(
        path=path,
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        names=_names(certificate),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        serial=f"{certificate.serial_number:x}",
        is_ca=_is_ca(certificate),
        error=error,
    )


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Raises CertificateUnusable, OSError."""
    return _parse(path, _read(path))


def _parse(path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise CertificateUnusable(f"{path} holds no certificate: {error}") from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise CertificateUnusable(f"{path} is larger than 1 MiB")
    return data


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return (
        *names.get_values_for_type(x509.UniformResourceIdentifier),
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    )


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        value = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        return False
    return bool(value.ca)
