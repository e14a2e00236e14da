"""Where stores may be: URLs are checked where they are written, and never carry or show a secret."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raymill.runtime.home import Home
from raymill.runtime.stores import REDIS_CA, REDIS_PASSWORD, Stores, places_of, redis_secrets, shown

HOME = Home(Path("/mill"))


@pytest.mark.parametrize(
    "url", ["redis://host", "redis://user@host:6380/3", "rediss://host:6379/0", "unix:///run/redis.sock?db=2"]
)
def test_urls_that_may_be(url):
    assert places_of(HOME, Stores(online=url)).online == url


def test_what_is_not_declared_is_a_folder_of_the_home():
    places = places_of(HOME, Stores())
    assert (places.lake, places.online) == (Path("/mill/lake"), Path("/mill/online"))
    assert places_of(HOME, Stores(lake="s3://bucket/prefix/")).lake == "s3://bucket/prefix"


@pytest.mark.parametrize(
    ("field", "url", "says"),
    [
        ("online", "redis://:hush@host", "leave it out and set RAYMILL_REDIS_PASSWORD"),
        ("online", "redis://user:hush@host:x/0", "no URL"),
        ("online", "/data/online", "does not begin with redis:// or rediss:// or unix://"),
        ("online", "redis://host/zero", "database number"),
        ("online", "rediss://host/0?ssl_cert_reqs=none", "database number"),
        ("online", "redis://", "database number"),
        ("online", "unix://host/run/s", "no socket's path"),
        ("online", "unix:///run/s?db=hush", "at most"),
        ("lake", "/data/lake", "does not begin with s3://"),
        ("lake", "s3://", "names no bucket"),
        ("lake", "s3://key:hush@bucket/x", "keys and endpoint come from the environment"),
    ],
)
def test_a_wrong_url_is_refused_with_the_remedy_and_no_secret(field, url, says):
    with pytest.raises(ValidationError, match=says) as told:
        Stores(**{field: url})
    assert "hush" not in str(told.value).replace("db=hush", "")


def test_secrets_come_from_the_environment_alone(monkeypatch):
    monkeypatch.setenv(REDIS_PASSWORD, "hush")
    monkeypatch.setenv(REDIS_CA, "/ca.pem")
    assert redis_secrets("redis://host") == {"password": "hush"}
    assert redis_secrets("rediss://host") == {"password": "hush", "ssl_ca_certs": "/ca.pem"}
    monkeypatch.delenv(REDIS_PASSWORD)
    assert redis_secrets("unix:///s") == {}


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1))
def test_a_password_is_never_shown(secret):
    assert shown(f"redis://user:{secret}@host:1/0") == "redis://user@host:1/0"
    assert shown(f"unix://:{secret}@/run/s?db=0") == "unix:///run/s?db=0"


def test_what_other_hosts_can_not_reach_is_told():
    there = Stores(lake="s3://bucket/x", online="redis://10.0.0.7:6379/0")
    assert there.of_one_host == ()
    for online in ("redis://localhost", "redis://127.0.0.1:6379/0", "unix:///run/s"):
        assert Stores(lake="s3://bucket/x", online=online).of_one_host == (
            f"the online store {online} means another place on each host",
        )
    assert len(Stores().of_one_host) == 2
