"""What `up` asks for before the endpoint is opened to other hosts: an address, a certificate, a key of its own."""

import subprocess
import time
from datetime import UTC, datetime, timedelta

import pytest

from raymill.cluster import certificate, exposure, lifecycle, session
from raymill.cluster.front import Front, haproxy_text
from raymill.cluster.ports import choose
from raymill.cluster.spec import ListenSpec, load_config
from raymill.runtime.api_keys import ApiKey, KeyPolicy, Right, digest_of, read_key_file
from raymill.runtime.errors import Exposed, SpecError
from raymill.runtime.home import Home
from raymill.runtime.records import RecordsActor


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Certificate and key, made by the command that `up` tells."""
    folder = tmp_path_factory.mktemp("tls")
    files = {"certificate": str(folder / "cert.pem"), "key": str(folder / "key.pem")}
    subprocess.run(certificate.TRIAL.format(names="IP:127.0.0.1", **files).split(), check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def faults(*files, days=0):
    return " | ".join(certificate.faults(*files, datetime.now(UTC) + timedelta(days=days)))


def test_the_pair_for_a_trial_is_good_for_a_year(pair):
    assert faults(*pair) == "" and faults(*pair, days=364) == ""
    assert "expired" in faults(*pair, days=366) and "only from" in faults(*pair, days=-2)
    begin, end = certificate.validity(pair[0])
    assert end - begin == timedelta(days=365)


def test_a_private_key_that_others_read_or_that_is_anothers_is_refused(pair, tmp_path):
    cert, key = pair
    other = tmp_path / "other.pem"
    other.write_bytes(key.read_bytes())
    other.chmod(0o644)
    assert f"`chmod 600 {other}`" in faults(cert, other)
    subprocess.run(["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-out", str(other)], check=True)
    other.chmod(0o600)
    assert "no certificate and its unencrypted key" in faults(cert, other)
    subprocess.run(
        ["openssl", "ec", "-in", str(key), "-aes256", "-passout", "pass:x", "-out", str(other)],
        check=True,
        capture_output=True,
    )
    assert "unencrypted" in faults(cert, other)  # and nobody is asked for the passphrase
    other.write_text("no PEM")
    assert "PEM" in faults(cert, other) and "PEM" in faults(other, key)
    assert "can be read" in faults(cert, tmp_path) and "can be read" in faults(tmp_path / "none", key)


def listening(pair, **fields):
    given = {"host": "127.0.0.1", "certificate": str(pair[0]), "private_key": str(pair[1])}
    return ListenSpec(**(given | fields))


def give_key(home, tenant, right, **fields):
    records = RecordsActor(home.root)
    records.start()
    key = ApiKey(digest=digest_of(f"rm_{tenant}"), tenant=tenant, rights=(right,), created_s=1.0, **fields)
    records.create_key(key)
    records.stop()
    return key


def refused(home, listen):
    with pytest.raises(Exposed) as caught:
        exposure.check(home, listen, "10.0.0.5", time.time())
    return str(caught.value)


def test_what_is_missing_is_told_at_once_with_its_commands(tmp_path):
    said = refused(Home(tmp_path), ListenSpec(host="0.0.0.0"))
    assert "`raymill up --host 0.0.0.0 --certificate cert.pem --private-key key.pem`" in said
    assert "`raymill keys create TENANT`" in said and "subjectAltName=IP:10.0.0.5" in said
    assert "no address of this machine" in refused(Home(tmp_path), ListenSpec(host="192.0.2.99"))
    assert "no address of this machine" in refused(Home(tmp_path), ListenSpec(host="everywhere"))


def test_only_a_tenants_key_that_predicts_and_holds_lets_the_endpoint_open(tmp_path, pair):
    home = Home(tmp_path)
    give_key(home, "late", Right.PREDICT, expires_s=2.0)
    give_key(home, "ops", Right.MANAGE)
    exposure.make_operator_key(home, time.time())
    assert "there is no API key" in refused(home, listening(pair))
    give_key(home, "acme", Right.PREDICT)
    exposure.check(home, listening(pair), "10.0.0.5", time.time())
    assert exposure.check(home, ListenSpec(require_key=True), "10.0.0.5", time.time()) is None  # loopback


def test_up_starts_nothing_that_would_be_open(tmp_path):
    home = Home(tmp_path)
    config = load_config().model_copy(update={"listen": ListenSpec(host="0.0.0.0")})
    with pytest.raises(SpecError, match="nothing was started"):
        lifecycle.up(home, config, ports="auto")
    assert session.load(home) is None


def test_the_operators_key_is_kept_while_it_holds_and_is_nobody_elses(tmp_path):
    home, now = Home(tmp_path), time.time()
    exposure.make_operator_key(home, now)
    first = read_key_file(home.operator_key)
    exposure.make_operator_key(home, now)
    assert read_key_file(home.operator_key) == first
    home.operator_key.chmod(0o644)  # somebody may have read it
    exposure.make_operator_key(home, now)
    second = read_key_file(home.operator_key)
    records = RecordsActor(home.root)
    records.start()
    holding = [k.digest for k in records.api_keys() if k.holds_at(now)]
    records.stop()
    assert second != first and holding == [digest_of(second)]


def test_who_needs_a_key_follows_from_where_one_listens():
    assert ListenSpec().keys is KeyPolicy.OFF and ListenSpec(host="::").keys is KeyPolicy.BEYOND
    assert ListenSpec(host="::", require_key=True).keys is KeyPolicy.ALL


def test_the_front_says_of_every_request_that_it_is_anothers(tmp_path):
    text = haproxy_text(Front(host="::1", https=1, grpcs=2, serve=3, grpc=4, folder=tmp_path))
    for frontend in text.split("frontend ")[1:]:
        assert "http-request set-header x-forwarded-for %[src]" in frontend
        assert "bind [::1]:" in frontend and " ssl crt " in frontend
    assert text.count("\nfrontend ") == 2 and "server serve 127.0.0.1:3\n" in text


def test_the_ports_for_other_hosts_are_those_of_the_file():
    ports = choose("auto", ListenSpec(host="127.0.0.1"))
    assert ports.https != 8443 and ports.https
    known = {"serve": ports.serve, "grpc": ports.grpc, "gcs": ports.gcs, "dashboard": ports.dashboard}
    spec = load_config().ports.model_copy(update=known)
    found = choose(spec, ListenSpec(host="127.0.0.1", https=ports.https, grpcs=ports.grpcs))
    assert (found.https, found.grpcs) == (ports.https, ports.grpcs)
