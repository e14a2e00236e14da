"""drifting.py, whose net tells, wherever it is built in a training, which host that is and what it sees of the head's.

Each rank puts a witness into the cluster's key-value store: a file would prove nothing across hosts.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

exec(Path(__file__).with_name("drifting.py").read_text())


class Watched(Net):  # noqa: F821  from drifting.py
    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        import psutil
        import ray
        from ray.experimental.internal_kv import _internal_kv_put

        home = Path(os.environ["RAYMILL_HOME"])
        witness = {
            "node": ray.get_runtime_context().get_node_id(),
            "ip": ray.util.get_node_ip_address(),
            "interfaces": sorted(psutil.net_if_addrs()),
            "home": sorted(p.name for p in home.iterdir()) if home.exists() else [],
            "rank": os.environ.get("RANK", ""),
        }
        _internal_kv_put(f"witness/{os.getpid()}@{witness['ip']}", json.dumps(witness), namespace="test")


pipeline = replace(pipeline, name="second-host", train=replace(pipeline.train, model=Watched))  # noqa: F821
