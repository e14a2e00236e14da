"""All tests: a HOME of their own, with Ray's token in it, set before Ray is imported.

Ray reads its authentication once a process: every local cluster that a test process starts has to find the same token.
"""

import hashlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

from raymill.cluster.environment import kernels_version

HOME = Path(tempfile.mkdtemp(prefix="raymill-tests-"))
(HOME / ".ray").mkdir(mode=0o700)
TOKEN = HOME / ".ray" / "auth_token"
TOKEN.touch(mode=0o600)
TOKEN.write_text(secrets.token_hex(32))
for name in [n for n in os.environ if n.startswith(("RAY_", "RAYMILL_"))]:
    del os.environ[name]
os.environ |= {"HOME": str(HOME), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


ACTORS = Path(__file__).parents[1] / "actors"
COMPILED = ACTORS / "__pycache__"
"""Where Numba keeps the checkout's kernels, for whoever is not told of another place."""


def pytest_configure():
    """Kernels compiled of other sources go: Numba looks at a kernel's own file alone, not at what that takes in."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # its starter has looked
        return
    seen, now = COMPILED / "kernels-version", kernels_version()
    if not seen.exists() or seen.read_text() != now:
        for old in COMPILED.glob("*.nb[ci]"):
            old.unlink(missing_ok=True)
        COMPILED.mkdir(exist_ok=True)
        seen.write_text(now)


@pytest.fixture(scope="session")
def kernels():
    """Compiled kernels for the homes of tests: the checkout's own, which the unit tests have compiled already."""
    place = HOME / "kernels" / kernels_version() / f"actors_{hashlib.sha1(str(ACTORS).encode()).hexdigest()}"
    place.parent.mkdir(parents=True, exist_ok=True)  # as Numba names the place of a folder's kernels
    if not place.is_symlink():
        place.symlink_to(COMPILED)
    return HOME / "kernels"


def pytest_unconfigure():
    """Leave nothing behind."""
    shutil.rmtree(HOME, ignore_errors=True)
