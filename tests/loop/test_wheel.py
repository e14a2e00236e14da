"""The built wheel works without the checkout: in a bare environment that sees the dependencies and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.loop.conftest import PIPELINES

SITE = Path(sysconfig.get_paths()["purelib"])

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import raymill.runtime, raymill.actors, raymill.cluster, raymill.cluster.providers, raymill.jobs, raymill.jobs.cli
names = []
for root in (raymill.runtime, raymill.actors, raymill.cluster, raymill.jobs):
    names += [m.name for m in pkgutil.walk_packages(root.__path__, root.__name__ + ".")]
files = {name: importlib.import_module(name).__file__ for name in names}
strange = [name for name in ("runtime", "actors", "cluster", "jobs", "tests") if importlib.util.find_spec(name)]
print(json.dumps({"files": files, "strange": strange}))
"""


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory) -> Path:
    """`bin` of an environment with the wheel; a .pth shows it the dependencies, without the editable finder there."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{SITE}\n")
    return folder / "bin"


def run(command: list[str | Path], cwd: Path, **more: str) -> str:
    """What a command printed, in a folder and a home of its own."""
    hidden = ("RAY_", "RAYMILL_", "PYTEST_", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    env |= {"HOME": str(cwd), "RAYMILL_HOME": str(cwd / "mill")} | more
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_what_is_no_python_and_nothing_beside_raymill(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"raymill/cluster/cluster.toml", "raymill/jobs/report.html"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"raymill", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_the_wheel_holds_every_module_of_the_checkout(wheel: Path):
    root = Path(__file__).parents[2]
    held = {n.removeprefix("raymill/") for n in zipfile.ZipFile(wheel).namelist()}
    folders = ("runtime", "actors", "cluster", "jobs")
    wanted = {str(p.relative_to(root)) for f in folders for p in (root / f).rglob("*") if p.suffix in WANTED}
    assert wanted <= held and len(wanted) > 100


WANTED = {".py", ".toml", ".html", ".json"}


def test_every_module_imports_from_the_wheel_and_no_bare_folder_of_ours_is_installed(bare: Path, tmp_path: Path):
    uncompiled = {"NUMBA_DISABLE_JIT": "1"}  # a new place has no kernels yet: half a minute to compile what is not run
    told = json.loads(run([bare / "python", "-c", IMPORT_ALL], tmp_path, **uncompiled).splitlines()[-1])
    assert told["strange"] == []
    assert {"raymill.jobs.cli.main", "raymill.cluster.providers.local", "raymill.actors.engine"} <= told["files"].keys()
    assert [f for f in told["files"].values() if not f.startswith(str(bare.parent))] == []


def test_help_lists_the_verbs(bare: Path, tmp_path: Path):
    said = run([bare / "raymill", "--help"], tmp_path)
    assert all(verb in said for verb in ("run", "plan", "up", "down", "promote", "lineage", "doctor"))


def test_the_doctor_answers_with_one_document(bare: Path, tmp_path: Path):
    command = [bare / "raymill", "doctor", "--json"]
    env = {"HOME": str(tmp_path), "RAYMILL_HOME": str(tmp_path / "mill"), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["healthy"] else 1), done.stderr
    assert all(f["severity"] and f["remedy"] for f in told["findings"])


def test_a_plan_is_made_of_a_users_own_file(bare: Path, tmp_path: Path):
    mine = Path(shutil.copy(PIPELINES / "drifting.py", tmp_path))
    told = json.loads(run([bare / "raymill", "plan", mine.name, "--json"], tmp_path))
    assert told["pipeline"] == "returns-costly" and "shop.rate_7d" in told["features"]
