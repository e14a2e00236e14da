"""A cluster of its own for the loop tests: own HOME, own RAYMILL_HOME, free ports; down at the end."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

RAYMILL = Path(sys.executable).parent / "raymill"
PIPELINES = Path(__file__).parent / "pipelines"


class Host:
    """Runs `raymill` as a user would, in an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "mill"
        (folder / "home").mkdir(parents=True, exist_ok=True)
        hidden = ("RAY_", "RAYMILL_", "PYTEST_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        self.env = clean | {"HOME": str(folder / "home"), "RAYMILL_HOME": str(self.home)}

    def raymill(self, *words: str, code: int = 0, timeout: float = 280, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a verb; the test fails if it does not end with `code`."""
        done = subprocess.run(
            [str(RAYMILL), *words], env=self.env | env, text=True, capture_output=True, timeout=timeout, check=False
        )
        assert done.returncode == code, (
            f"raymill {' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def document(self, *words: str, **options: Any) -> Any:
        """The JSON document that a verb prints."""
        return json.loads(self.raymill(*words, "--json", **options).stdout)

    def python(self, code: str, timeout: float = 280, **env: str) -> str:
        """Run a script on the cluster; what it printed."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.env | env,
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


def last_document(printed: str) -> Any:
    """The JSON object that a script printed last; Ray prints lines of the raylet's after it, as it likes."""
    return json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))


@pytest.fixture(scope="session")
def host(tmp_path_factory, kernels):
    """A host whose cluster is up for all tests of the session that ask for it."""
    made = Host(tmp_path_factory.mktemp("loop"))
    made.home.mkdir()
    (made.home / "kernels").symlink_to(kernels)
    made.raymill("up", "--ports", "auto")
    yield made
    made.raymill("down")
    left = [p for p in Path("/proc").glob("[0-9]*/environ") if _carries(p, str(made.home))]
    assert not left, f"left running: {left}"


@pytest.fixture(scope="module")
def apart(kernels):
    """A host below /tmp, which its worker nodes do not see; the kernels are its head's alone."""
    folder = Path(tempfile.mkdtemp(prefix="raymill-apart-", dir="/tmp"))
    made = Host(folder)
    made.home.mkdir()
    (made.home / "kernels").symlink_to(kernels)
    yield made
    made.raymill("down")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def served(host: Host) -> dict[str, Any]:
    """The summary of a run through drift that costs nothing; its endpoint is up, with a model that was promoted."""
    summary = host.document("run", str(PIPELINES / "drifting.py"), SHIFT="free")
    assert [v["stage"] for v in summary["versions"]] == ["retired", "live"]
    return dict(summary)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The built wheel. Built from a copy: a `build` folder of an earlier day would put deleted modules into it."""
    root, copy = Path(__file__).parents[2], tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    for name in ("runtime", "actors", "cluster", "jobs"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy.parent), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = copy.parent.glob("*.whl")
    return built


def _carries(environ: Path, text: str) -> bool:
    try:
        return f"RAYMILL_SESSION={text}".encode() in environ.read_bytes()
    except OSError:
        return False
