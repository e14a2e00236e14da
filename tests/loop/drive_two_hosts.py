"""What `test_stores_by_address.py` runs on the cluster: both hosts take rows in and answer, then the second one serves.

Prints one JSON line.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import ray
import xgboost

from raymill.actors.endpoint import Placement
from raymill.actors.feature_plan import FeaturePlan
from raymill.actors.lake import Lake
from raymill.actors.rollout import spec_of
from raymill.jobs import pipeline_file
from raymill.jobs.cli.records import join, needed_session
from raymill.jobs.reach import endpoint_of
from raymill.runtime.client import connect
from raymill.runtime.records import RecordsActor, RemoteRecords
from raymill.runtime.spawn import on_head, spawn

ELSEWHERE = {"raymill.io/market": "reserved"}
"""Label of the second host."""
COMPILED = {"NUMBA_CACHE_DIR": ""}
"""It takes the kernels that the checkout's tests have compiled, beside their modules, and not none as a new host."""


def fitted(inputs: int) -> bytes:
    """Some model."""
    x = np.random.default_rng(0).normal(size=(100, inputs)).astype(np.float32)
    settings = {"objective": "binary:logistic", "nthread": 1}
    return bytes(xgboost.train(settings, xgboost.DMatrix(x, x[:, 0] > 0), 2).save_raw("ubj"))


def told(answers: dict) -> dict:
    """Without the bytes, but their hash."""
    sizes = [len(b) for b in (*answers["training"], answers["vectors"])]
    found = hashlib.sha256(b"".join([*answers.pop("training"), answers.pop("vectors")])).hexdigest()
    return answers | {"answers": found, "sizes": sizes}


session = needed_session()
join(session)
pipeline_file.load(Path(os.environ["PIPELINE"]))
(shop,) = pipeline_file.loaded()
ray.cloudpickle.register_pickle_by_value(shop)
home = str(session.home.root)
rows = shop.orders()
first, second = {"first": rows.slice(0, 900)}, {"second": rows.slice(900)}

answers = ray.remote(shop.answers)
there = answers.options(label_selector=ELSEWHERE, runtime_env={"env_vars": COMPILED})
alone = shop.answers(f"{home}/alone", shop.in_folders(), first | second)
spawn(RecordsActor, home, name="records", **on_head())
shop.answers(home, shop.pipeline, first)
remote = ray.get(there.remote(home, shop.pipeline, second))
here = shop.answers(home, shop.pipeline, {})
offline = np.frombuffer(here["vectors"], dtype=np.float32).reshape(300, -1)

records, plan = RemoteRecords(), FeaturePlan.of(shop.pipeline)
records.register(shop.pipeline.name, "model", fitted(len(plan.names)), None, "t1", {}, 0.5)
records.promote(shop.pipeline.name, 1, reason="the only one")
endpoint = endpoint_of(session)
spec = spec_of(shop.pipeline, plan.to_json(), records.versions(shop.pipeline.name))
endpoint.deploy([spec], Placement(label_selector=ELSEWHERE, env=COMPILED))
asked, at = shop.asked()
columns = asked.select(list(spec.required)).append_column("at", asked.column("placed_at"))
answered = connect(session.serve_url).predict(shop.pipeline.name, columns)
endpoint.flush()
nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
logged = Lake(shop.pipeline.stores.lake).read("predictions", columns=["id", "x"])
x = dict(zip(logged.column("id").to_pylist(), logged.column("x").to_pylist(), strict=True))
served = np.array([x[i] for i in answered.column("id").to_pylist()], dtype=np.float32)
print(
    json.dumps(
        {
            "alone": told(alone),
            "there": told(remote),
            "here": told(here),
            "replicas": [nodes[r.node_id] for r in endpoint.replicas()],
            "served_as_joined": served.tobytes() == offline.tobytes(),
            "rows": len(served),
        }
    )
)
sys.stdout.flush()
endpoint.close()
