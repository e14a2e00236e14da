import os
import socket
import subprocess

from raymill.cluster import certificate, doctor, lifecycle, processes, session
from raymill.cluster.spec import load_config, parse_config
from raymill.runtime.home import Home


def found(findings):
    return " | ".join(f.what for f in findings)


def test_a_token_that_others_can_read_is_found(tmp_path):
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    assert "0644" in found(doctor.check_token(token))
    token.chmod(0o600)
    assert found(doctor.check_token(token)) == ""


def test_an_operators_key_that_others_can_read_is_found(tmp_path):
    key = tmp_path / "operator.key"
    assert found(doctor.check_key_file(key)) == ""
    key.touch(0o600)
    assert found(doctor.check_key_file(key)) == ""
    key.chmod(0o640)
    assert "0640" in found(doctor.check_key_file(key))


def test_a_certificate_that_ends_soon_and_a_front_that_is_down_are_found(tmp_path):
    home, files = Home(tmp_path), {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    command = certificate.TRIAL.replace("-days 365", "-days 9").format(names="IP:127.0.0.1", **files)
    subprocess.run(command.split(), check=True, capture_output=True)
    listen = {"host": "127.0.0.1", "certificate": files["certificate"], "private_key": files["key"]}
    config = parse_config({**load_config().model_dump(), "listen": listen}, "test")
    home.cluster.mkdir()
    (home.cluster / "config.json").write_text(config.model_dump_json())
    running = session.Session(
        root=str(tmp_path),
        state="running",
        managed=True,
        has_autoscaler=True,
        address="",
        dashboard_url="",
        serve_url="",
        token_path="",
        started_s=0.0,
        public_host="127.0.0.1",
    )
    said = found(doctor.check_front(running))
    assert "certificate expires at" in said and "does not run" in said
    os.chmod(files["key"], 0o644)
    assert "chmod 600" in found(doctor.check_front(running))


def test_a_taken_port_is_found_with_its_holder():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        ports = {"gcs": 20001, "dashboard": 20002, "grpc": 20003, "serve": taken.getsockname()[1]}
        config = parse_config({**load_config().model_dump(), "ports": ports}, "test")
        assert f"held by pid {os.getpid()}" in found(doctor.check_ports(config))


def test_an_old_build_lock_is_found_and_a_fresh_one_is_not(tmp_path):
    lock = tmp_path / "py311_cpu" / "comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert found(doctor.check_build_locks([tmp_path])) == ""
    os.utime(lock, (1, 1))
    assert "build lock" in found(doctor.check_build_locks([tmp_path]))


def test_a_session_file_that_is_damaged_or_whose_processes_are_gone_is_found(tmp_path):
    home = Home(tmp_path)
    assert found(doctor.check_stale(home)) == ""
    home.cluster.mkdir(parents=True)
    session.state_path(home).write_text("{")
    assert "damaged" in found(doctor.check_stale(home))


def test_down_drops_the_build_locks_of_its_killed_ranks(tmp_path):
    home = Home(tmp_path)
    lock = home.kernels / "torch_extensions" / "comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    home.cluster.mkdir()
    assert lifecycle.down(home) == 0 and not lock.exists()


def test_what_is_mended_is_ours_alone(tmp_path):
    home, other = Home(tmp_path / "ours"), tmp_path / "theirs"
    ours, theirs = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, processes.SESSION_MARK: str(root)})
        for root in (home.root, other)
    )
    try:
        assert "not written down" in found(doctor.check_stale(home))
        assert doctor.mend(home) and ours.wait(timeout=5) != 0
        assert theirs.poll() is None and doctor.mend(home) == []
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def test_a_machine_that_is_too_small_is_an_error_that_names_what_is_short(tmp_path):
    document = load_config().model_dump()
    document["head"]["object_store_mb"] = 10**9
    config = parse_config(document, "test")
    (finding,) = [f for f in doctor.check_size(Home(tmp_path), config) if f.severity is doctor.Severity.ERROR]
    assert "/dev/shm" in finding.what and "memory" in finding.what and finding.where == str(tmp_path)


def test_a_missing_package_and_one_that_is_too_old_are_found():
    wanted = ["pyarrow>=20", "no-such-package>=1", "numpy>=999", 'ruff>=999; extra == "dev"']
    assert [f.what.split(" ")[0] for f in doctor.check_packages(wanted)] == ["no-such-package", "numpy"]
    assert found(doctor.check_python()) == ""
