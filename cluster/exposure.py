"""What must be there before the endpoint is opened: keys and TLS for other hosts, the operator's own key."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from raymill.cluster import certificate
from raymill.cluster.front import is_everywhere, is_ipv6
from raymill.cluster.spec import ListenSpec
from raymill.runtime.api_keys import OPERATOR, ApiKey, Right, digest_of, new_key, read_key_file
from raymill.runtime.errors import Exposed, RequestError
from raymill.runtime.home import Home
from raymill.runtime.key_registry import KeyRegistry
from raymill.runtime.ledger import Ledger
from raymill.runtime.whole_files import PRIVATE, write_whole

RECORD_WAIT_S = 10.0
"""How long another opener of the record may take to go away."""


def check(home: Home, listen: ListenSpec, own_address: str, now_s: float) -> None:
    """Refuse to open the endpoint to other hosts without a key that predicts and a certificate that holds.

    Raises:
        Exposed: names all that is missing, each with the command that mends it.
    """
    if not listen.host:
        return
    missing = list(_address_faults(listen.host))
    names = "IP:" + (own_address if is_everywhere(listen.host) else listen.host)
    pair = {"certificate": listen.certificate or "cert.pem", "key": listen.private_key or "key.pem"}
    if not (listen.certificate and listen.private_key):
        missing.append(
            f"no certificate and private key are named: `raymill up --host {listen.host} "
            f"--certificate {pair['certificate']} --private-key {pair['key']}` "
            f"(a pair for a trial: `{certificate.TRIAL.format(names=names, **pair)}`)"
        )
    else:
        files = Path(listen.certificate).expanduser(), Path(listen.private_key).expanduser()
        missing += certificate.faults(*files, datetime.fromtimestamp(now_s, UTC))
    if not any(Right.PREDICT in k.rights and k.holds_at(now_s) for k in _tenants_keys(home)):
        missing.append("there is no API key that may predict: `raymill keys create TENANT`")
    if missing:
        raise Exposed(
            f"the endpoint is not opened to other hosts at {listen.host}, and nothing was started: {'; '.join(missing)}"
        )


def make_operator_key(home: Home, now_s: float) -> None:
    """See to it that the operator's key is there and holds; the key of a former `up` is kept."""
    with _registry(home) as registry:
        holding = {k.digest for k in registry.every() if k.tenant == OPERATOR and k.holds_at(now_s)}
        try:
            if digest_of(read_key_file(home.operator_key)) in holding:
                return
        except RequestError:  # it is not there, or others have read it perhaps: a new one takes its place
            pass
        for digest in holding:
            registry.revoke(digest, "a new operator's key takes its place")
        key = new_key()
        write_whole(home.operator_key, key + "\n", mode=PRIVATE)
        registry.create(ApiKey(digest=digest_of(key), tenant=OPERATOR, rights=tuple(Right), created_s=now_s))


def _tenants_keys(home: Home) -> list[ApiKey]:
    if not home.record.exists():
        return []
    with _registry(home) as registry:
        return [k for k in registry.every() if k.tenant != OPERATOR]


@contextmanager
def _registry(home: Home) -> Iterator[KeyRegistry]:
    ledger = Ledger(home.record, lock_wait_s=RECORD_WAIT_S)
    try:
        yield KeyRegistry(ledger, time.time)
    finally:
        ledger.close()


def _address_faults(host: str) -> Iterator[str]:
    try:
        ipaddress.ip_address(host)
        with socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError) as err:
        yield f"{host!r} is no address of this machine ({err}): `ip -brief address` lists them"
