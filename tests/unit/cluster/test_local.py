from raymill.cluster.providers.local import Launch, start_command


def launch(**changed):
    known = {"instance": "spot-1", "node_type": "spot", "market": "spot", "resources": {"CPU": 1, "memory": 5 << 20}}
    known |= {"labels": {}, "object_store_bytes": 7, "agent_port": 9, "node_address": "", "temp_dir": "/tmp/s/n-1"}
    return Launch(**known | changed)


def test_a_node_on_this_machine_has_a_folder_of_its_own():
    # Ray lays a job's working directory anew for each node that starts: in a shared folder it takes the running job's.
    assert "--temp-dir=/tmp/s/n-1" in start_command(launch(), "127.0.0.1:1")


def test_a_node_that_is_a_second_host_has_ray_s_own_folder_on_its_own_disk():
    command = start_command(launch(node_address="10.0.0.2", temp_dir=""), "10.0.0.1:1")
    assert "--node-ip-address=10.0.0.2" in command and not any(c.startswith("--temp-dir") for c in command)
