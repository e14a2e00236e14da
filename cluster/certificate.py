"""The certificate and private key of the endpoint: whether they can be used, and until when."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

TRIAL = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=raymill "
    "-addext subjectAltName={names} -keyout {key} -out {certificate}"
)
"""Makes a certificate for a trial; openssl gives the key's file mode 0600."""


def faults(certificate: Path, private_key: Path, now: datetime) -> Iterator[str]:
    """What keeps the two from being used, each with its remedy; nothing: they can be."""
    missing = [p for p in (certificate, private_key) if not os.access(p, os.R_OK) or not p.is_file()]
    if missing:
        yield from (f"{path} is no file that can be read: name another" for path in missing)
        return
    status = private_key.stat()
    if status.st_mode & 0o077:
        yield f"the private key {private_key} has mode {status.st_mode & 0o777:04o}: `chmod 600 {private_key}`"
    if status.st_uid not in (0, os.getuid()):
        yield f"the private key {private_key} belongs to another user, who can change it: `chown {os.getuid()}` it"
    try:
        # A passphrase that is asked for nobody answers: the empty one makes it an error.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, password=lambda: "")
        begin, end = validity(certificate)
    except (OSError, ValueError) as err:
        yield f"{certificate} and {private_key} are no certificate and its unencrypted key, both PEM ({err})"
        return
    if now >= end:
        yield f"the certificate {certificate} expired at {end:%Y-%m-%d %H:%M} UTC: renew it"
    if now < begin:
        yield f"the certificate {certificate} holds only from {begin:%Y-%m-%d %H:%M} UTC on"


def validity(certificate: Path) -> tuple[datetime, datetime]:
    """From when until when the first certificate of a PEM file holds, UTC.

    Raises:
        OSError, ValueError: it can not be read, or is no certificate.
    """
    from cryptography import x509

    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    return found.not_valid_before_utc.astimezone(UTC), found.not_valid_after_utc.astimezone(UTC)
