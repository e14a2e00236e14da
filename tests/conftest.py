"""All tests: a HOME of their own, with Ray's token in it, set before Ray is imported.

Ray reads its authentication once a process: every local cluster that a test process starts has to find the same token.
"""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

HOME = Path(tempfile.mkdtemp(prefix="raymill-tests-"))
(HOME / ".ray").mkdir(mode=0o700)
TOKEN = HOME / ".ray" / "auth_token"
TOKEN.touch(mode=0o600)
TOKEN.write_text(secrets.token_hex(32))
for name in [n for n in os.environ if n.startswith(("RAY_", "RAYMILL_"))]:
    del os.environ[name]
os.environ |= {"HOME": str(HOME), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="session")
def kernels():
    """Compiled kernels, which may be lost and so may be shared: compiled once for all homes of the tests."""
    (HOME / "kernels").mkdir(exist_ok=True)
    return HOME / "kernels"


def pytest_unconfigure():
    """Leave nothing behind."""
    shutil.rmtree(HOME, ignore_errors=True)
