"""API keys at rest: digests only, changes with their events, files that nobody else reads."""

import pytest

from raymill.runtime import api_keys
from raymill.runtime.api_keys import ApiKey, Right, digest_of, new_key, read_key_file
from raymill.runtime.errors import RequestError, UnknownKey, Usage
from raymill.runtime.records import RecordsActor


@pytest.fixture
def records(tmp_path):
    found = RecordsActor(tmp_path)
    found.start()
    yield found
    found.stop()


def made(key, tenant="acme", **fields):
    return ApiKey(digest=digest_of(key), tenant=tenant, rights=(Right.PREDICT,), created_s=1.0, **fields)


def test_a_key_is_known_by_its_digest_alone_and_its_changes_are_told_once(records, tmp_path):
    keys = [new_key(), new_key()]
    assert len(set(keys)) == 2 and all(k.startswith("rm_") and len(k) > 45 for k in keys)
    stamp, found = records.keys_changed_since(-1)
    assert found == [] and records.keys_changed_since(stamp) is None
    first, second = made(keys[0]), made(keys[1], expires_s=9.0)
    for key in (first, first, second):
        assert records.create_key(key) == key
    stamp, found = records.keys_changed_since(stamp)
    assert sorted(found, key=lambda k: k.digest) == sorted([first, second], key=lambda k: k.digest)
    revoked = records.revoke_key(first.id, "leaked")
    assert revoked.revoked_s is not None and records.revoke_key(first.id, "again") == revoked
    assert records.create_key(first) == revoked  # for good
    stamp, found = records.keys_changed_since(stamp)
    assert found == [second] and records.keys_changed_since(stamp) is None
    told = [(e["kind"], e["subject"], e["data"].get("reason")) for e in records.events("key.*")]
    assert told == [
        ("key.created", f"key/{first.id}", None),
        ("key.created", f"key/{second.id}", None),
        ("key.revoked", f"key/{first.id}", "leaked"),
    ]
    assert records.verify().broken_seq is None
    at_rest = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert not any(k[3:].encode() in at_rest for k in keys)
    assert (tmp_path / "record.db").stat().st_mode & 0o777 == 0o600


def test_keys_are_there_after_a_restart(tmp_path):
    key = made(new_key(), expires_s=5.5)
    for _ in range(2):
        records = RecordsActor(tmp_path)
        records.start()
        records.create_key(key)
        assert records.api_keys() == [key]
        records.stop()


@pytest.mark.parametrize("name", ["", "zz", "0"])
def test_what_names_no_key_or_several_revokes_none(records, name):
    for number in range(40):
        records.create_key(made(f"rm_{number}"))
    with pytest.raises(UnknownKey, match="API keys have an id"):
        records.revoke_key(name, "why")
    assert all(k.revoked_s is None for k in records.api_keys())


@pytest.mark.parametrize("tenant", ["", "Acme", "a b", "-a", "a" * 64, "ä", "a\n"])
def test_what_is_no_name_is_no_tenant(tenant):
    with pytest.raises(Usage, match="lower case"):
        api_keys.check_tenant(tenant)


def test_a_key_is_read_from_a_file_of_ones_own_alone(tmp_path):
    file, key = tmp_path / "key", new_key()
    with pytest.raises(RequestError, match="can not be read"):
        read_key_file(file)
    file.write_text(key + "\n")
    file.chmod(0o640)
    with pytest.raises(RequestError, match=f"0640.*chmod 600 {file}"):
        read_key_file(file)
    file.chmod(0o600)
    assert read_key_file(file) == key
    file.write_text("something secret")
    with pytest.raises(RequestError, match="holds no API key") as caught:
        read_key_file(file)
    assert "secret" not in str(caught.value)


def test_the_environment_names_a_key_or_its_file(tmp_path, monkeypatch):
    assert api_keys.key_of_environment() is None
    file, key = tmp_path / "key", new_key()
    file.touch(0o600)
    file.write_text("rm_other")
    monkeypatch.setenv("RAYMILL_API_KEY_FILE", str(file))
    assert api_keys.key_of_environment() == "rm_other"
    monkeypatch.setenv("RAYMILL_API_KEY", key)
    assert api_keys.key_of_environment() == key
