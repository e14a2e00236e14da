"""A program's bytes in the object store: read from its file once, mapped by every process, gone when it is retired."""

import re
import time

import numpy as np
import pytest
import ray
import torch
from ray._private.internal_api import memory_summary
from safetensors.torch import save

from raymill.actors import envelope, model_files
from raymill.actors.code_model import weights_of
from raymill.actors.envelope import Envelope
from raymill.runtime.errors import StoreError
from raymill.runtime.home import Home
from raymill.runtime.records import NAME, RecordsActor, RemoteRecords
from raymill.runtime.spawn import end, spawn

WIDE = 1024
NET = f"""
import torch
from ray._private.internal_api import memory_summary

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear({WIDE}, {WIDE}, device="meta")

    def forward(self, x):
        return self.wide(x).sum(dim=1)
"""


@ray.remote(num_cpus=0)
class Replica:
    """Loads a program as a serving replica does, and keeps it."""

    def load(self, digest):
        data = RemoteRecords().program(digest)
        self.run = model_files.load(data).run
        self.weight = weights_of(envelope.unpack(data).payload)["wide.weight"]
        return self.run(np.ones((2, WIDE), np.float32))

    def mapped_from(self):
        """Which file the net's weights lie in."""
        with open("/proc/self/maps") as maps:
            for line in maps:
                first, last = (int(part, 16) for part in line.split()[0].split("-"))
                if first <= self.weight.data_ptr() < last:
                    return " ".join(line.split()[5:])

    def unload(self):
        self.run = self.weight = None


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "raymill"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMILL_HOME", str(folder))
        ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=150 << 20)
        spawn(RecordsActor, str(folder), name=NAME)
        yield Home(folder)
        ray.shutdown()


def net(seed):
    torch.manual_seed(seed)
    weights = save({"wide.weight": torch.randn(WIDE, WIDE), "wide.bias": torch.zeros(WIDE)})
    return envelope.pack(Envelope(form="code", target="nets:Net", source=NET, payload=weights))


def stored_mib():
    """MiB in the object store."""
    told = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    return float(re.search(r"Plasma memory usage ([\d.]+) MiB", told)[1])


def falls_to(mib, within_s=20):
    end_s = time.monotonic() + within_s
    while stored_mib() > mib and time.monotonic() < end_s:
        time.sleep(0.2)
    return stored_mib() <= mib


def test_the_second_replica_reads_no_file_maps_the_same_memory_and_a_retired_program_is_freed(home):
    records, before = RemoteRecords(), stored_mib()
    version = records.register("net", "code", net(1), None, "", {}, 0.5)
    records.promote("net", version.version, reason="first")
    falls_to(before + 1)  # what carried the bytes to the actor
    first, second = Replica.remote(), Replica.remote()
    answer = ray.get(first.load.remote(version.digest))
    (home.models / f"{version.digest}.pt2").unlink()
    assert np.array_equal(ray.get(second.load.remote(version.digest)), answer)
    assert stored_mib() == pytest.approx(before + 4, abs=1)  # one copy for both: 1024² float32
    files = {ray.get(r.mapped_from.remote()) for r in (first, second)}
    assert all("plasma" in file or "/dev/shm" in file for file in files), files

    other = records.register("net", "code", net(2), None, "", {}, 0.5)
    records.promote("net", other.version, reason="the next")
    with pytest.raises(StoreError):  # the holder has let go of it, and its file is gone
        records.program(version.digest)
    assert ray.get(second.load.remote(other.digest)).shape == (2,)
    assert np.array_equal(ray.get(first.load.remote(other.digest)), ray.get(second.load.remote(other.digest)))
    assert falls_to(before + 5)  # of two programs one is left


def test_a_killed_records_actor_takes_its_objects_along_and_the_next_one_reads_the_file(home):
    records = RemoteRecords()
    version = records.register("again", "code", net(3), None, "", {}, 0.5)
    replica = Replica.remote()
    answer = ray.get(replica.load.remote(version.digest))
    end(NAME)
    spawn(RecordsActor, str(home.root), name=NAME)
    assert np.array_equal(ray.get(replica.load.remote(version.digest)), answer)
