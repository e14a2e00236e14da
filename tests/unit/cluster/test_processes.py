import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from raymill.cluster import ports, processes
from raymill.cluster.spec import PortSpec
from raymill.runtime.errors import ClusterError


@pytest.fixture
def family(tmp_path):
    """A marked shell that ignores SIGTERM, with a child."""
    script = "trap '' TERM; sleep 60 & echo ready; wait; sleep 60"
    parent = subprocess.Popen(
        ["bash", "-c", script], env={**os.environ, processes.SESSION_MARK: str(tmp_path)}, stdout=subprocess.PIPE
    )
    parent.stdout.readline()
    yield str(tmp_path), parent
    for process in processes.marked(processes.SESSION_MARK, str(tmp_path)):
        os.kill(process.pid, 9)
    parent.wait()


def test_marked_processes_are_found_with_their_children_and_ended_for_good(family):
    mark, parent = family
    found = processes.marked(processes.SESSION_MARK, mark)
    assert parent.pid in {p.pid for p in found} and len(found) == 2
    assert {p.pid for p in processes.with_descendants([processes.describe(parent.pid)])} == {p.pid for p in found}
    assert processes.end(found, term_wait_s=0.2) == []
    assert processes.marked(processes.SESSION_MARK, mark) == []


def test_a_pid_that_was_given_to_another_process_is_left_alone(family):
    _, parent = family
    stranger = processes.describe(parent.pid)
    processes.end([replace(stranger, started=stranger.started - 1)], term_wait_s=0)
    assert stranger.is_alive


def test_this_process_and_those_above_it_are_never_ended():
    me = processes.describe(os.getpid())
    processes.end([me], term_wait_s=0)
    assert me.is_alive


def test_a_taken_port_is_refused_with_its_holder_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port {port} \(serve\) is held by pid {os.getpid()} \("):
            ports.choose(PortSpec(serve=port, gcs=20001, dashboard=20002, grpc=20003))


def test_ports_picked_free_do_not_overlap():
    chosen = ports.choose("auto")
    blocks = [
        range(p, p + (ports.BLOCK if name.startswith("replica") else 1))
        for name, p in ((n, getattr(chosen, n)) for n in chosen.__slots__)
    ]
    flat = [p for block in blocks for p in block]
    assert len(set(flat)) == len(flat)


def test_an_haproxy_whose_session_has_no_gcs_is_an_orphan(tmp_path):
    fake = tmp_path / "haproxy"
    fake.symlink_to(sys.executable)
    process = subprocess.Popen(
        [fake, "-c", "import time; time.sleep(60)"], env={**os.environ, processes.SESSION_MARK: str(tmp_path)}
    )
    try:
        while not any(p.pid == process.pid for p in processes.orphaned_haproxy()):
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
