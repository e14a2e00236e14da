"""What `cluster.toml` declares: the head, the node types with their prices, the provider, the ports."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raymill.runtime.api_keys import KeyPolicy
from raymill.runtime.errors import SpecError

DEFAULT_CONFIG = Path(__file__).parent / "cluster.toml"
"""The demo's cluster, used where no other file is named."""

HEAD_TYPE = "head"
"""Node type of the head; no node type may take its name."""

Market = Literal["reserved", "spot"]
Port = Annotated[int, Field(ge=1024, le=65535)]
Whole = dict[str, Annotated[int, Field(ge=0)]]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class NodeShape(_Value):
    """What every node has, the head included."""

    memory_mb: int = Field(ge=200)
    """Memory that Ray may hand out on the node."""
    object_store_mb: int = Field(ge=80)
    """Shared memory for objects; Ray would claim 30 % of the machine."""
    price_usd_per_h: float = Field(ge=0)
    """What one hour of the node costs."""


class HeadSpec(NodeShape):
    """The node that runs control actors, replicas and everything that opens a durable place."""

    cpus: int = Field(default=4, ge=1)
    """Logical CPUs of the head."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of the head."""
    resources: Whole = {"head": 100}
    """Custom resources of the head."""


class NodeType(NodeShape):
    """A kind of worker node that the autoscaler may launch."""

    market: Market
    """Whether it is paid for in full or may be taken away; the label `raymill.io/market` of its nodes."""
    max_workers: int = Field(ge=0)
    """Most nodes of the type at a time."""
    min_workers: int = Field(default=0, ge=0)
    """Nodes of the type that are there from the start and never go for idleness."""
    resources: Whole = {"CPU": 1, "GPU": 1}
    """What a node has, in whole numbers."""
    labels: dict[str, str] = {}
    """Further Ray labels of its nodes."""

    @model_validator(mode="after")
    def _fits(self) -> NodeType:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than max_workers {self.max_workers}")
        return self


class ProviderSpec(_Value):
    """How worker nodes come and go."""

    isolate: bool = False
    """Whether each worker node gets a network and mount namespace of its own (root only): a second host, for tests."""
    idle_timeout_s: float = Field(default=25, ge=1)
    """A node that does nothing for so long goes away."""
    max_workers: int = Field(default=8, ge=0)
    """Most worker nodes of all types together."""
    launch_timeout_s: float = Field(default=60, ge=5)
    """A node that is not up by then counts as a failed launch."""


class PortSpec(_Value):
    """Ports that people and programs know; all others are picked free."""

    gcs: Port = 6379
    """Ray's address."""
    dashboard: Port = 8265
    """Ray's dashboard, jobs and Serve's REST."""
    serve: Port = 8000
    """The endpoint."""
    grpc: Port = 9000
    """The endpoint's gRPC."""

    @model_validator(mode="after")
    def _differ(self) -> PortSpec:
        named = self.model_dump()
        if len(set(named.values())) < len(named):
            raise ValueError(f"two ports are the same: {named}")
        return self


class ListenSpec(_Value):
    """Who may call the endpoint, and where callers from other hosts come in."""

    host: str = ""
    """Address at which other hosts reach the endpoint by TLS, `0.0.0.0` for all of this machine's; empty: none."""
    certificate: str = ""
    """PEM file of the certificate with its chain."""
    private_key: str = ""
    """PEM file of the certificate's key, which its owner alone may read."""
    https: Port = 8443
    """Port of the endpoint there."""
    grpcs: Port = 9443
    """Port of its gRPC there."""
    require_key: bool = False
    """Whether callers on this host need an API key as well."""

    @property
    def keys(self) -> KeyPolicy:
        """Who needs a key."""
        if self.require_key:
            return KeyPolicy.ALL
        return KeyPolicy.BEYOND if self.host else KeyPolicy.OFF


class ClusterConfig(_Value):
    """A whole `cluster.toml`."""

    head: HeadSpec
    """The head."""
    node_types: dict[str, NodeType]
    """Name → worker node type."""
    provider: ProviderSpec = ProviderSpec()
    """How worker nodes come and go."""
    ports: PortSpec = PortSpec()
    """Ports that people and programs know."""
    listen: ListenSpec = ListenSpec()
    """Who may call the endpoint, and from where."""

    @field_validator("node_types")
    @classmethod
    def _names(cls, types: dict[str, NodeType]) -> dict[str, NodeType]:
        for name in types:
            if name == HEAD_TYPE or not name.replace("-", "").isalnum() or not name.islower():
                raise ValueError(f"node type {name!r}: lower case letters, digits and -, and not {HEAD_TYPE!r}")
        return types

    def price(self, node_type: str) -> float:
        """USD per hour of a node of that type, the head included; an unknown type costs nothing."""
        if node_type == HEAD_TYPE:
            return self.head.price_usd_per_h
        known = self.node_types.get(node_type)
        return known.price_usd_per_h if known else 0.0

    def market(self, node_type: str) -> str:
        """`reserved` or `spot`; the head is paid for in full."""
        known = self.node_types.get(node_type)
        return known.market if known else "reserved"

    @property
    def spot_types(self) -> frozenset[str]:
        """Names of the node types that may be taken away."""
        return frozenset(name for name, kind in self.node_types.items() if kind.market == "spot")


def load_config(path: str | Path | None = None) -> ClusterConfig:
    """The checked contents of a `cluster.toml`; without a path, the demo's.

    Raises:
        SpecError: the file is not there, is no TOML, or a field is wrong; names file and field.
    """
    file = Path(path) if path is not None else DEFAULT_CONFIG
    try:
        document = tomllib.loads(file.read_text())
    except OSError as err:
        raise SpecError(f"cluster file {file} can not be read ({err.strerror}): name another with --config") from err
    except tomllib.TOMLDecodeError as err:
        raise SpecError(f"cluster file {file} is no TOML: {err}") from err
    return parse_config(document, str(file))


def parse_config(document: dict[str, Any], where: str) -> ClusterConfig:
    """The checked value of a parsed `cluster.toml`.

    Raises:
        SpecError: a field is wrong; names all of them.
    """
    try:
        return ClusterConfig.model_validate(document)
    except ValidationError as err:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg']}" for e in err.errors())
        raise SpecError(f"cluster file {where}: {faults}") from err
