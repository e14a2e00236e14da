"""The loop corrects itself: drift that costs leads to a promotion, drift that does not leads to nothing, bad versions
never answer for long."""

import json

import pytest

from tests.loop.conftest import PIPELINES, Host, last_document

SHOP = str(PIPELINES / "drifting.py")


@pytest.fixture(scope="module")
def costly(host: Host):
    """The summary of a run in which the meaning of the data turns round."""
    return host.document("run", SHOP, SHIFT="costly")


def test_drift_that_costs_leads_to_a_retrain_and_its_promotion(costly):
    first, second = costly["retrains"]
    assert first["reason"] == "first model" and first["outcome"] == "promoted"
    assert second["reason"].startswith("regret") and second["outcome"] == "promoted"
    assert second["at"] == "2020-03-07"  # the first verdict after 29 February
    assert [v["stage"] for v in costly["versions"]] == ["retired", "retired", "live"]


def test_no_request_fails_though_a_replica_is_killed_under_load(costly):
    assert costly["requests"]["failed"] == 0
    assert costly["requests"]["rows"] == 39_000


def test_a_spot_node_reclaimed_in_mid_training_loses_no_step_and_keeps_the_data_order(costly, host: Host):
    assert costly["spot"] == {"reclaimed": 1, "steps_lost": 0}
    progress = json.loads((host.home / "runs" / costly["run"] / "loop.json").read_text())
    (change,) = progress["gang_changes"]
    assert (change["before"], change["after"], change["reason"]) == (2, 1, "spot reclaim notice")
    assert len({t["steps"] for t in progress["trainings"]}) == 1


def test_the_parts_of_the_cost_sum_to_the_bill(costly):
    parts = costly["cost"]["parts"]
    assert {"training", "serving", "idle"} <= parts.keys() and min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(costly["cost"]["bill_usd"], abs=1e-9)
    assert costly["cost"]["bill_usd"] > 0 < parts["training"]


def test_rows_are_counted_and_spoilt_ones_are_told_apart(costly):
    assert costly["rows"] == {"ingested": 84_000, "quarantined": {}, "seeded_bad": 2, "without_label": 0}


def test_the_report_shows_the_reclaim_and_the_kill(costly, host: Host):
    page = (host.home / "runs" / costly["run"] / "report.html").read_text()
    assert "spot reclaim notice" in page and "Replica killed under load" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


def test_a_prediction_is_walked_back_to_its_source_rows(costly, host: Host):
    steps = host.document("lineage", "--prediction", f"{costly['run']}-2020-03-10-00007")["steps"]
    told = json.dumps(steps)
    assert len(steps) >= 4
    for word in ("returns-costly", "shop.rate_7d", "lake_version", "order"):
        assert word in told


def test_what_was_answered_is_what_the_lake_gives_offline_bit_for_bit(costly, host: Host):
    """Every vector that a replica computed and logged, against the point-in-time join over the lake."""
    compared = host.python(PARITY, SHIFT="costly")
    assert int(compared.split()[-1]) >= 10_000


def test_the_run_itself_checked_a_sample_of_what_it_served(costly, host: Host):
    judged = costly["consistency"]
    assert (judged["rows"], judged["mismatched"], judged["alert"]) == (2000, 0, False)
    assert costly["seconds"]["consistency"] > 0 and len(costly["checks"]) > 1  # the periods, too
    (view,) = costly["freshness"]["views"]
    assert view["view"] == "shop" and view["behind_s"] == 0


def test_an_online_record_that_somebody_replaced_is_found_and_named(costly, host: Host):
    host.python(SKEW, SHIFT="costly")
    words = ("features", "consistency", "returns-costly", "--check", "--rows", "100000")
    (judged,) = json.loads(host.raymill(*words, "--json", code=3).stdout)
    (finding,) = judged["features"]
    assert finding["feature"] == "shop.rate_7d" and finding["causes"] == {"code": 200}
    assert "its records are not those of the lake" in finding["why"]
    assert host.document("status")["alerts"][0]["model"] == "returns-costly"


def test_a_bad_candidate_never_goes_live_and_a_bad_canary_rolls_back_by_itself(host: Host):
    told = last_document(host.python(BAD_VERSIONS, SHIFT="none"))
    assert told["shuffled"] == "rejected"
    assert told["canary"] == "rejected" and told["canary_answered"] > 0
    assert told["live_before"] == told["live_after"]
    assert told["outcomes"][-2:] == ["rejected", "rolled_back"]
    assert told["failed"] == 0


def test_drift_that_costs_nothing_starts_no_retrain(served, host: Host):
    """The last of this file, as the endpoint of that run is what the files after it ask."""
    assert [r["reason"] for r in served["retrains"]] == ["first model"]
    verdicts = host.document("drift", served["pipeline"])
    assert max(v["input_drift"]["order.noise"] for v in verdicts) > 1
    assert not any(v["retrain"] for v in verdicts)


PARITY = f"""
import pyarrow as pa, pyarrow.compute as pc, numpy as np, json, os
from pathlib import Path
from raymill.jobs import pipeline_file
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.point_in_time import join
from raymill.runtime.home import current_home
pipeline = pipeline_file.load(Path({SHOP!r}))
lake = Lake(current_home().lake)
logged = lake.read("predictions", where=[("model", "=", pipeline.name)])
rows = lake.read("orders")
keys = pa.array([json.loads(k)[0] for k in logged["key"].to_pylist()])
at = {{k: i for i, k in enumerate(rows["order"].to_pylist())}}
asked = rows.take(pa.array([at[k] for k in keys.to_pylist()]))
offline = join(asked, FeaturePlan.of(pipeline), {{"orders": rows}}, at="placed_at")
online = np.stack([np.asarray(x, dtype=np.float32) for x in logged["x"].to_pylist()])
assert np.array_equal(offline.view(np.uint32), online.view(np.uint32)), np.argwhere(offline != online)[:5]
print(len(online))
"""

SKEW = f"""
from pathlib import Path
import httpx, pyarrow as pa
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.online import OnlineStore
from raymill.cluster import session
from raymill.jobs import pipeline_file
from raymill.runtime import connect
from raymill.runtime.home import current_home
pipeline = pipeline_file.load(Path({SHOP!r}))
rows = pipeline.sources[0].read().slice(83_800, 200)  # of the last day but one that was replayed
shifted = rows.set_column(rows.column_names.index("returned"), "returned", pa.array([9.0] * 200))
shifted = shifted.set_column(0, "order", pa.array([f"forged-{{i}}" for i in range(200)]))
shifted = shifted.set_column(rows.column_names.index("known_at"), "known_at", rows["placed_at"])
store = OnlineStore(current_home().online, FeaturePlan.of(pipeline))
store.ingest(pipeline.sources[0].name, shifted)
store.close()
asked = pa.table({{c: rows[c] for c in pipeline.request_columns}})
asked = asked.append_column("at", pa.array([rows["placed_at"][-1].as_py()] * 200, pa.timestamp("us", "UTC")))
with connect(session.load(current_home()).serve_url) as client:
    client.predict(pipeline.name, asked)
    httpx.post(client.url + "/raymill/flush", timeout=60).raise_for_status()
"""

BAD_VERSIONS = f"""
import json
from dataclasses import replace
from pathlib import Path
import numpy as np, pyarrow as pa
from raymill.cluster import session
from raymill.jobs import pipeline_file
from raymill.jobs.cli.records import join, needed_session
join(needed_session())
import ray
from raymill.actors.gate import Decision
from raymill.actors.retrain import Asked, Judged, Phase, Trained, step
from raymill.cluster.spec import load_config
from raymill.jobs.asking import Asking
from raymill.jobs.correction import Correction
from raymill.jobs.loop import ingest
from raymill.jobs.replay import DAY_US
from raymill.jobs.run import open_run
from raymill.jobs.world import build_world, recorded
from raymill.runtime.messages import TrainingSet

def shuffled(training_set):
    table = ray.get(training_set.train_ref)
    y = np.random.default_rng(1).permutation(table["y"].to_numpy())
    mixed = table.set_column(table.column_names.index("y"), "y", pa.array(y))
    return replace(training_set, train_ref=ray.put(mixed.combine_chunks()))

class Mixed(Correction):
    spoil = False
    def _training_set(self, training_id, at):
        made = super()._training_set(training_id, at)
        return shuffled(made) if self.spoil else made

pipeline = pipeline_file.load(Path({SHOP!r}))
found = needed_session()
with open_run(found.home, pipeline.name, "{{}}") as run:
    world = build_world(pipeline, found, load_config(), run)
    recording = recorded(pipeline)
    for batch in recording.history():
        world.data.ingest(batch.source, batch.rows, batch_id=batch.batch_id)
    world.features.rebuild(recording.start)
    loop = Mixed(world, run, print)
    loop.first_live(recording.start)
    world.deploy()
    loop.begin(recording.start)                     # an honest model becomes canary
    asking = Asking(world, run)

    def play(days):
        for day in days:
            world.features.replay_to(day + DAY_US)
            for batch in recording.batches(day):
                ingest(world, run, batch, day)
            for request in recording.requests(day, run.id):
                asking.ask(request)
            loop.day_passed(day + DAY_US, recording.start)

    days = recording.days()
    play(days[:3])
    honest = world.records.live(pipeline.name).version
    assert loop.state.phase is Phase.WATCHING and world.records.get(pipeline.name, honest).kind == "model"

    loop.spoil = True                               # a candidate from shuffled labels meets the gate
    now = days[6]
    play(days[3:6])
    loop.tell(Asked(at=now, reason="test: shuffled labels"))
    shuffled_version = loop.state.history[-1]["version"]

    play(days[6:9])                                 # the same thing, waved through the gate, becomes canary
    class Waved(Mixed):
        def _judge_candidate(self, what):
            waved = Decision(accept=True, reason="test: waved through")
            return Judged(version=what.version, decision=waved, at=what.at)
    loop = Waved(world, run, print)
    loop.spoil = True
    loop.tell(Asked(at=days[9], reason="test: bad canary"))
    canary = loop.state.version
    play(days[9:15])
    world.flush_predictions()
    asking.note(run.progress)
    from raymill.actors.lake import Lake
    import pyarrow.compute as pc
    log = Lake(world.home.lake).read("predictions", where=[("model", "=", pipeline.name)])
    told = {{
        "shuffled": world.records.get(pipeline.name, shuffled_version).stage,
        "canary": world.records.get(pipeline.name, canary).stage,
        "canary_answered": int(pc.sum(pc.equal(log["version"], canary)).as_py()),
        "live_before": honest,
        "live_after": world.records.live(pipeline.name).version,
        "outcomes": [h["outcome"] for h in loop.state.history],
        "failed": run.progress.requests["failed"],
    }}
    run.progress.finished = True
    run.save()
    world.close()
print(json.dumps(told))
"""
