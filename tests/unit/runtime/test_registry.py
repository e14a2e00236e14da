"""The registry: one live version, changes that may be asked for again, programs that are what their name says."""

import hashlib
import itertools
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.runtime.errors import Conflict, RaymillError, StoreError, UnknownModel, UnknownVersion
from raymill.runtime.ledger import Ledger
from raymill.runtime.messages import Manifest, Stage
from raymill.runtime.registry import TRANSITIONS, Registry

MANIFEST = Manifest(
    pipeline="m", lake_versions={"flights": 3}, features=("a.x", "a.y"), feature_hashes={"a.x": "1", "a.y": "2"},
    label="late", label_rule=["gt", ["col", "arr_delay"], 15], start_at=0, end_at=9, known_until=9, rows=5,
    without_label=1,
)  # fmt: skip


@pytest.fixture
def registry(tmp_path):
    ledger = Ledger(tmp_path / "record.db")
    yield Registry(ledger, tmp_path / "models", clock=lambda: 5.0)
    ledger.close()


def add(registry, n, kind="model"):
    return registry.register("m", kind, b"program %d" % n, MANIFEST, f"t{n}", {"auc": 0.7}, 0.2, at=n)


def stages(registry):
    return {v.version: str(v.stage) for v in registry.versions("m")}


def kinds(registry):
    return [e["kind"] for e in registry._ledger.events()]


def test_a_registered_version_comes_back_whole_with_its_program(registry):
    made = add(registry, 1)
    assert made == registry.get("m", 1) == registry.versions("m")[0]
    assert made.manifest == MANIFEST and made.metrics == {"auc": 0.7} and made.stage is Stage.CANDIDATE
    assert made.history == ({"stage": "candidate", "wall_s": 5.0, "at": 1, "reason": "registered"},)
    assert registry.program(made.digest) == b"program 1"
    assert made.digest == hashlib.sha256(b"program 1").hexdigest()
    assert registry.models() == ["m"]


def test_registering_a_training_again_gives_the_version_there_is(registry):
    assert add(registry, 1) == add(registry, 1)
    assert add(registry, 1, "baseline").version == 2
    assert kinds(registry) == ["model.registered"] * 2


def test_a_program_registered_by_hand_twice_is_one_version(registry):
    for _ in range(2):
        assert registry.register("m", "model", b"by hand", None, "", {}, 0.5).version == 1
    assert registry.register("m", "model", b"another", None, "", {}, 0.5).version == 2


def test_promotion_retires_the_live_version_and_writes_it_all_down(registry):
    for n in (1, 2):
        add(registry, n)
        registry.promote("m", n, reason="better", at=10 * n)
    assert registry.live("m").version == 2 and stages(registry) == {1: "retired", 2: "live"}
    assert [h["stage"] for h in registry.get("m", 1).history] == ["candidate", "live", "retired"]
    assert kinds(registry)[2:] == ["model.registered", "model.retired", "model.promoted"]
    assert registry._ledger.events("model.promoted", subject="m/2")[0]["at"] == 20


def test_every_change_asked_for_again_finds_itself_done(registry):
    for n in (1, 2, 3):
        add(registry, n)
    registry.promote("m", 1, reason="first")
    registry.start_canary("m", 2, reason="try")
    registry.reject("m", 3, reason="gate")
    before = kinds(registry)
    assert registry.promote("m", 1, reason="again").version == 1
    assert registry.start_canary("m", 2, reason="again").stage is Stage.CANARY
    assert registry.reject("m", 3, reason="again").stage is Stage.REJECTED
    assert kinds(registry) == before


def test_roll_backs_go_ever_further_back_and_never_to_what_was_rolled_back(registry):
    for n in (1, 2, 3):
        add(registry, n)
        registry.promote("m", n, reason="better")
    assert registry.rollback("m", reason="worse", version=3).version == 2
    assert registry.rollback("m", reason="sent again", version=3).version == 2
    assert registry.rollback("m", reason="worse", version=2).version == 1
    assert stages(registry) == {1: "live", 2: "retired", 3: "retired"}
    with pytest.raises(Conflict, match="nothing to roll back to"):
        registry.rollback("m", reason="worse")
    registry.promote("m", 3, reason="it was not to blame")
    assert registry.rollback("m", reason="it was").version == 1


def test_what_a_stage_does_not_allow_is_a_conflict_that_changes_nothing(registry):
    add(registry, 1)
    add(registry, 2)
    registry.promote("m", 1, reason="first")
    registry.reject("m", 2, reason="gate")
    before = kinds(registry)
    with pytest.raises(Conflict, match="m/2 is rejected, which can become nothing, not live"):
        registry.promote("m", 2, reason="please")
    for change in (registry.reject, registry.start_canary):
        with pytest.raises(Conflict, match="m/1 is live"):
            change("m", 1, reason="no")
    assert registry.live("m").version == 1 and kinds(registry) == before


def test_unknown_models_and_versions_are_named(registry):
    with pytest.raises(UnknownModel, match="'m'"):
        registry.promote("m", 1, reason="")
    with pytest.raises(UnknownModel, match="'m'"):
        registry.rollback("m", reason="")
    add(registry, 1)
    with pytest.raises(UnknownVersion, match=r"no version 7, it has \[1\]"):
        registry.get("m", 7)
    with pytest.raises(Conflict, match="no live version"):
        registry.rollback("m", reason="")
    assert registry.live("other") is None and registry.versions("other") == []


def test_two_live_versions_are_impossible_in_the_database_itself(registry):
    add(registry, 1)
    add(registry, 2)
    registry.promote("m", 1, reason="first")
    db = sqlite3.connect(registry._ledger.path)
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("UPDATE versions SET stage = 'live' WHERE version = 2")
    db.close()


def test_a_damaged_or_missing_program_is_refused_and_mended_by_registering_again(registry):
    made = add(registry, 1)
    path = registry._path(made.digest)
    path.write_bytes(b"bit rot")
    with pytest.raises(StoreError, match="damaged"):
        registry.program(made.digest)
    path.unlink()
    with pytest.raises(StoreError, match="restore the file"):
        registry.program(made.digest)
    add(registry, 1)
    assert registry.program(made.digest) == b"program 1"
    with pytest.raises(StoreError, match="no program's digest"):
        registry.program("../../etc/passwd")


def test_a_half_written_program_of_a_dead_process_is_cleared_away(registry):
    add(registry, 1)
    leftover = registry._models / ".program-abc"
    leftover.write_bytes(b"half")
    Registry(registry._ledger, registry._models)
    assert not leftover.exists() and len(list(registry._models.iterdir())) == 1


CHANGES = st.tuples(st.sampled_from(["add", "promote", "start_canary", "reject", "rollback"]), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(CHANGES, max_size=14))
def test_whatever_is_asked_stages_follow_the_table_and_at_most_one_is_live(tmp_path_factory, changes):
    home = tmp_path_factory.mktemp("registry")
    ledger = Ledger(home / "record.db")
    registry = Registry(ledger, home / "models")
    for change, n in changes:
        try:
            if change == "add":
                add(registry, n)
            elif change == "rollback":
                registry.rollback("m", reason="")
            else:
                getattr(registry, change)("m", n, reason="")
        except RaymillError:
            pass
        assert list(stages(registry).values()).count("live") <= 1
    for version in registry.versions("m"):
        walked = [Stage(h["stage"]) for h in version.history]
        assert walked[0] is Stage.CANDIDATE and walked[-1] is version.stage
        assert all(b in TRANSITIONS[a] for a, b in itertools.pairwise(walked))
    moves = [e for e in ledger.events("model.*") if e["kind"] != "model.registered"]
    assert len(moves) == sum(len(v.history) - 1 for v in registry.versions("m"))
    ledger.close()


WRITER = """
import sys
from pathlib import Path
from raymill.runtime.ledger import Ledger
from raymill.runtime.registry import Registry
home = Path(sys.argv[1])
registry = Registry(Ledger(home / "record.db", lock_wait_s=10), home / "models")
n = int(sys.argv[2])
while True:
    v = registry.register("m", "model", b"x" * 10000 + b"%d" % n, None, f"t{n}", {}, 0.5)
    registry.promote("m", v.version, reason="r")
    print(v.version, v.digest, flush=True)
    n += 1
"""


def test_kill_9_leaves_every_acknowledged_version_with_its_program_and_one_live(tmp_path):
    acknowledged: list[list[str]] = []
    for round_ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(len(acknowledged))]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged.append(writer.stdout.readline().split())
        time.sleep(0.03 * round_)
        writer.send_signal(signal.SIGKILL)
        acknowledged += [line.split() for line in writer.stdout.read().split("\n") if len(line) > 65]
        writer.wait()
    ledger = Ledger(tmp_path / "record.db")
    registry = Registry(ledger, tmp_path / "models")
    versions = registry.versions("m")
    assert len({v.training_id for v in versions}) == len(versions)
    assert {int(v): d for v, d in acknowledged}.items() <= {v.version: v.digest for v in versions}.items()
    assert all(registry.program(v.digest) for v in versions)
    assert [v.stage for v in versions].count(Stage.LIVE) == 1
    assert ledger.verify().broken_seq is None
    ledger.close()
