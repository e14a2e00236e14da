"""A second host on this machine: a network namespace on a bridge, with private /tmp, /dev/shm and RAYMILL_HOME.

Root only. `enter` (run as `python -m raymill.cluster.providers.namespace`) is the inside: it hides the folders in a
mount namespace of its own, keeps reachable what a second host would have installed (the venv, the checkout, Ray's
token), and becomes the command.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from raymill.runtime.errors import ClusterError

KEEP = "--keep"
HIDE = "--hide"
NODES_PER_BRIDGE = 250
_STASH = Path("/mnt")  # covered by a tmpfs of the namespace's own while things are moved


@dataclass(frozen=True, slots=True)
class Network:
    """The bridge of one session, and the addresses on it."""

    name: str
    """Name of the bridge, of every node's interface on it, and beginning of every namespace's name."""
    prefix: str
    """First three bytes of its addresses, `10.x.y`."""

    @property
    def head(self) -> str:
        """The head's address."""
        return f"{self.prefix}.1"

    def node(self, index: int) -> Node:
        """The `index`-th second host, from 0."""
        return Node(f"{self.name}-{index}", f"{self.prefix}.{index + 2}", f"{self.name}v{index}", self)


@dataclass(frozen=True, slots=True)
class Node:
    """One second host."""

    namespace: str
    address: str
    veth: str
    network: Network


def network_of(root: Path) -> Network:
    """The network of the session with that home: the same name each time, so that leftovers are found again."""
    digest = hashlib.sha256(str(root).encode()).digest()
    return Network(f"rm{digest[:4].hex()}", f"10.{200 + digest[4] % 50}.{digest[5]}")


def can_isolate() -> str:
    """Empty if this process may make namespaces, else the reason."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    return f"{missing} are not installed" if missing else ""


def open_bridge(network: Network) -> None:
    """Make the bridge; one that is there is made anew.

    Raises:
        ClusterError: not root, or the kernel refuses.
    """
    reason = can_isolate()
    if reason:
        raise ClusterError(f"[provider] isolate needs root, iproute2 and util-linux ({reason}): set isolate = false")
    close(network)
    _run("ip", "link", "add", network.name, "type", "bridge")
    _run("ip", "addr", "add", f"{network.head}/24", "dev", network.name)
    _run("ip", "link", "set", network.name, "up")


def open_node(node: Node) -> None:
    """Make the network namespace and its way to the bridge."""
    close_node(node)
    inside = ("ip", "-n", node.namespace)
    _run("ip", "netns", "add", node.namespace)
    _run("ip", "link", "add", node.veth, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
    _run("ip", "link", "set", node.veth, "master", node.network.name, "up")
    _run(*inside, "link", "set", "eth0", "name", node.network.name)  # one name on every host, as gloo and NCCL want it
    _run(*inside, "addr", "add", f"{node.address}/24", "dev", node.network.name)
    _run(*inside, "link", "set", node.network.name, "up")
    _run(*inside, "link", "set", "lo", "up")


def close_node(node: Node) -> None:
    """Remove the namespace and its interface; nothing, if they are gone."""
    if node.namespace in _namespaces():
        subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True, check=False)
    if Path("/sys/class/net", node.veth).exists():
        subprocess.run(["ip", "link", "delete", node.veth], capture_output=True, check=False)


def close(network: Network) -> None:
    """Remove the bridge and all namespaces of the session; nothing, if they are gone."""
    for name in _namespaces():
        if name.startswith(f"{network.name}-"):
            close_node(network.node(int(name.rpartition("-")[2])))
    if Path("/sys/class/net", network.name).exists():
        subprocess.run(["ip", "link", "delete", network.name], capture_output=True, check=False)


def free_index(used: set[str]) -> int:
    """Smallest index whose namespace is not in use."""
    taken = {int(name.rpartition("-")[2]) for name in used if name}
    for index in range(NODES_PER_BRIDGE):
        if index not in taken:
            return index
    raise ClusterError(f"all {NODES_PER_BRIDGE} namespaces of this session are in use: lower [provider] max_workers")


def command_inside(node: Node, hide: list[Path], keep: list[Path], command: list[str]) -> list[str]:
    """The command line that runs `command` on that second host."""
    arguments = [a for p in hide for a in (HIDE, str(p))] + [a for p in keep for a in (KEEP, str(p))]
    return [
        *("ip", "netns", "exec", node.namespace, "unshare", "--mount", "--propagation", "private"),
        *(sys.executable, "-m", "raymill.cluster.providers.namespace", *arguments, "--", *command),
    ]


def enter(arguments: list[str]) -> None:
    """Hide and keep as told, then become the command behind `--`; called inside a fresh mount namespace."""
    split = arguments.index("--")
    pairs = list(zip(arguments[:split:2], arguments[1:split:2], strict=True))
    hide = [Path(value) for word, value in pairs if word == HIDE]
    keep = [Path(value) for word, value in pairs if word == KEEP and _is_below(Path(value), hide)]
    _run("mount", "-t", "tmpfs", "tmpfs", str(_STASH))
    for number, path in enumerate(keep):
        _bind(path, _STASH / str(number))
    for path in sorted(hide):
        path.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(path))
    for number, path in enumerate(keep):
        _bind(_STASH / str(number), path)
    for path in hide:  # what was kept may have brought a hidden folder back
        if any(path.is_relative_to(kept) and path != kept for kept in keep):
            path.mkdir(parents=True, exist_ok=True)
            _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(path))
    os.execvp(arguments[split + 1], arguments[split + 1 :])


def _bind(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _run("mount", "--bind", str(source), str(target))


def _is_below(path: Path, hidden: list[Path]) -> bool:
    return path.exists() and any(path.is_relative_to(h) for h in hidden)


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(
            f"`{' '.join(command)}` failed ({done.stderr.strip()}): namespaces need root; see `raymill doctor`"
        )


if __name__ == "__main__":
    enter(sys.argv[1:])
