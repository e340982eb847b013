"""Certificates: what they say, who may read them, how they are renewed under a reader."""

from __future__ import annotations

import datetime as dt
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from cilia.pki.authority import (
    Authority,
    AuthorityExists,
    AuthorityUnusable,
    CertificateRequestInvalid,
    NoAuthority,
    Request,
)
from cilia.pki.files import CertificateUnusable, Credentials, describe, identity_of


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "pki")
    made.init()
    return made


def handshake(server: Path, client: Path, host: str) -> str:
    """The verdict of OpenSSL, which is not what made the certificates."""
    one = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    one.load_cert_chain(server / "tls.crt", server / "tls.key")
    one.load_verify_locations(server / "ca.crt")
    one.verify_mode = ssl.CERT_REQUIRED
    two = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    two.load_cert_chain(client / "tls.crt", client / "tls.key")
    two.load_verify_locations(client / "ca.crt")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = two.wrap_bio(to_client, to_server, server_hostname=host)
    theirs = one.wrap_bio(to_server, to_client, server_side=True)
    done = set()
    for _ in range(6):
        for side in (ours, theirs):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return str(error.reason)
    return "ok" if len(done) == 2 else "unfinished"


def test_files_and_their_modes(authority: Authority) -> None:
    authority.issue(Request(node="n1", service="xds", names=("n1.example.com", "192.0.2.1", "::1")))
    modes = {
        str(path.relative_to(authority.directory)): stat.S_IMODE(path.stat().st_mode)
        for path in authority.directory.rglob("*")
        if path.is_file()
    }
    assert modes == {
        "ca.crt": 0o644,
        "ca.key": 0o600,
        "n1-xds/tls.crt": 0o644,
        "n1-xds/tls.key": 0o600,
        "n1-xds/ca.crt": 0o644,
    }
    info = describe(authority.directory / "n1-xds/tls.crt")
    assert info.names == ("spiffe://cilia/node/n1/xds", "n1.example.com", "192.0.2.1", "::1")
    assert 89 < info.days_left() <= 90
    assert not info.is_ca
    assert identity_of(info.names) == ("n1", "xds")


def test_openssl_accepts_both_ends_and_the_names(authority: Authority) -> None:
    authority.issue(Request(node="n1", service="xds", names=("n1.example.com",)))
    authority.issue(Request(node="web-7", service="envoy"))
    server, client = authority.directory / "n1-xds", authority.directory / "web-7-envoy"
    assert handshake(server, client, "n1.example.com") == "ok"
    assert handshake(server, client, "n2.example.com") == "CERTIFICATE_VERIFY_FAILED"


def test_a_certificate_of_another_authority_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    authority.issue(Request(node="n1", service="xds", names=("localhost",)))
    other = Authority(tmp_path / "other")
    other.init()
    other.issue(Request(node="web-7", service="envoy"))
    stranger = other.directory / "web-7-envoy"
    (stranger / "ca.crt").write_bytes((authority.directory / "ca.crt").read_bytes())
    refused = handshake(authority.directory / "n1-xds", stranger, "localhost")
    assert refused == "CERTIFICATE_VERIFY_FAILED"


def test_rotation_keeps_names_and_days(authority: Authority) -> None:
    request = Request(node="n1", service="xds", names=("a.example", "192.0.2.1"), days=30)
    first = authority.issue(request)
    [second] = authority.rotate()
    assert second.names == first.names
    assert second.serial != first.serial
    assert 29 < second.days_left() <= 30
    assert authority.rotate(within_days=10) == []
    assert len(authority.rotate(within_days=31)) == 1
    assert len(authority.rotate(["n1-xds"])) == 1


def test_old_and_new_certificates_meet_while_the_authority_changes(
    authority: Authority, tmp_path: Path
) -> None:
    authority.issue(Request(node="n1", service="xds", names=("localhost",)))
    authority.issue(Request(node="web-7", service="envoy"))
    server, client = authority.directory / "n1-xds", authority.directory / "web-7-envoy"
    # A holder elsewhere, that was brought the new ca.crt and still has the old certificate.
    old = tmp_path / "old"
    old.mkdir()
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (old / name).write_bytes((client / name).read_bytes())
    before = (authority.directory / "ca.crt").read_bytes()
    authority.rotate(ca=True)
    assert (authority.directory / "ca.crt").read_bytes().endswith(before)
    assert handshake(server, client, "localhost") == "ok"
    (old / "ca.crt").write_bytes((authority.directory / "ca.crt").read_bytes())
    assert handshake(server, old, "localhost") == "ok"
    # And the new authority issues.
    authority.issue(Request(node="n2", service="xds", names=("localhost",)))
    assert handshake(authority.directory / "n2-xds", client, "localhost") == "ok"


def test_an_authority_that_was_killed_in_its_rotation_still_issues(authority: Authority) -> None:
    """New certificate trusted, key not yet in its place; then with the key in its place."""
    old_key = (authority.directory / "ca.key").read_bytes()
    authority.rotate(ca=True)
    new_key = (authority.directory / "ca.key").read_bytes()
    (authority.directory / "ca.key").write_bytes(old_key)
    (authority.directory / "ca.key.next").write_bytes(new_key)
    authority.issue(Request(node="n1", service="xds", names=("localhost",)))
    one = authority.directory / "n1-xds"
    assert handshake(one, one, "localhost") == "ok"


def test_a_reader_takes_up_what_was_renewed_and_nothing_half_written(authority: Authority) -> None:
    authority.issue(Request(node="n1", service="xds"))
    directory = authority.directory / "n1-xds"
    credentials = Credentials(directory)
    first = credentials.current()
    assert credentials.current() is first
    new_key = (directory / "tls.key").read_bytes()
    authority.rotate()
    second = credentials.current()
    assert second.chain != first.chain
    # The key of another certificate: as in the middle of a replacement.
    good = (directory / "tls.key").read_bytes()
    (directory / "tls.key").write_bytes(new_key)
    assert credentials.current() is second
    assert "not the certificate's" in credentials.error
    assert credentials.info().error
    (directory / "tls.key").unlink()
    assert credentials.current() is second
    (directory / "tls.key").write_bytes(good)
    assert credentials.current().chain == second.chain
    assert credentials.error == ""


def test_unusable_files_say_what_is_wrong(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(CertificateUnusable, match="cannot read"):
        Credentials(tmp_path / "absent").current()
    authority.issue(Request(node="n1", service="xds"))
    directory = authority.directory / "n1-xds"
    (directory / "tls.crt").write_text("nonsense")
    with pytest.raises(CertificateUnusable, match="holds no certificate"):
        Credentials(directory).current()
    [_, broken] = authority.issued()
    assert "holds no certificate" in broken.error


def test_mistakes_are_named(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(AuthorityExists):
        authority.init()
    with pytest.raises(NoAuthority):
        Authority(tmp_path / "none").issue(Request(node="n", service="s"))
    with pytest.raises(NoAuthority):
        Authority(tmp_path / "none").issued()
    for wrong in (
        Request(node="../n", service="s"),
        Request(node="N1", service="s"),
        Request(node="n", service=""),
        Request(node="n", service="s", names=("a b",)),
        Request(node="n", service="s", names=("a..b",)),
        Request(node="n", service="s", days=0),
    ):
        with pytest.raises(CertificateRequestInvalid):
            authority.issue(wrong)
    (authority.directory / "ca.key").write_text("nonsense")
    with pytest.raises(AuthorityUnusable, match="not a private key"):
        authority.issue(Request(node="n", service="s"))


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.init(days=10)
    authority.issue(Request(node="n", service="s", days=90))
    certificate = x509.load_pem_x509_certificate((tmp_path / "n-s/tls.crt").read_bytes())
    left = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert left <= dt.timedelta(days=10)


@pytest.mark.parametrize(
    ("names", "identity"),
    [
        (("spiffe://cilia/node/n1/xds", "n2"), ("n1", "xds")),
        (("spiffe://example.org/ns/default/sa/web",), ("web", "")),
        (("web.example.com",), ("web.example.com", "")),
        (("https://x/",), ("", "")),
        ((), ("", "")),
    ],
)
def test_whom_a_certificate_names(names: tuple[str, ...], identity: tuple[str, str]) -> None:
    assert identity_of(names) == identity
