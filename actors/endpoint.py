"""Shell around Serve's REST config: deploys the application, changes its versions, waits until every replica says so.

Serve is told a whole configuration each time; if only `user_config` differs it keeps the replicas and calls their
`reconfigure` (0.4 s, no request dropped). A version that does not load takes no traffic: the configuration before it
is put back, and the failure is raised.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx

from raymill.actors.prepared import environment
from raymill.actors.rollout import ModelSpec, from_user_config, generation, reroute, to_user_config, without
from raymill.actors.version_health import Report
from raymill.runtime.api_keys import KeyPolicy, read_key_file
from raymill.runtime.errors import ClusterError, ModelError, SpecError, StoreError, Unavailable
from raymill.runtime.home import Home
from raymill.runtime.messages import Stage
from raymill.runtime.turns import turn
from raymill.runtime.whole_files import write_json

APPLICATION = "raymill"
IMPORT_PATH = "raymill.actors.serving:build"
DEPLOYMENT = "Replica"
GRACE_S = 12.0
"""How long a replica that leaves may take in all, before it is killed: what it was asked is answered long before, but
Serve alone keeps it for its shortest drain (2 s under `raymill up`), and the count must not end with that."""
MOST_HELD = 4096
"""Requests that are held while no replica runs."""
HELD = {
    "max_queued_requests": MOST_HELD,
    "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
}
"""How many they are, and what those beyond are told."""
APART_S = 2.0
"""Shortest time between two changes: Serve hides a replica from the proxy for a tenth of a second at each. The proxy
looks 0.5 s after the first sign of a change, when that is over, and then takes 0.6 s and more to follow; a change that
came meanwhile it would see at any moment, and send requests to no replica until it has looked again."""
_API = "/api/serve/applications/"
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """A replica as Serve sees it."""

    replica_id: str
    state: str
    pid: int | None
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where replicas run, and how many."""

    replicas: int = 1
    """How many."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom resources of each, e.g. `{"head": 0.01}` to pin it to the head's host."""
    cpus: float = 1.0
    """CPUs of each."""
    label_selector: dict[str, str] = field(default_factory=dict)
    """Node labels that the grant asks for."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of each."""
    autoscaling: dict[str, Any] = field(default_factory=dict)
    """`autoscaling_config`, where the number follows the load; empty: it stays `replicas`."""
    prepare: tuple[str, ...] = ()
    """Modules that a process has imported which waits on the head for the next replica of those that follow the load;
    empty: none waits."""

    @property
    def variables(self) -> dict[str, str]:
        """All environment variables of a replica."""
        return {**self.env, **environment(self.prepare)} if self.autoscaling and self.prepare else self.env


class Endpoint:
    """The Serve application of one cluster."""

    def __init__(
        self,
        dashboard_url: str,
        home: Home,
        *,
        url: str = "http://127.0.0.1:8000",
        serve_options: dict[str, Any] | None = None,
        headers: Callable[[], dict[str, str]] | None = None,
        reports: Callable[[], list[Report]] | None = None,
        keys: str = KeyPolicy.OFF,
    ) -> None:
        """Args are the places: Ray's dashboard, the home that replicas open, the endpoint itself.

        `serve_options` is what a session says of proxy and HTTP options; absent: from `url`. `headers` gives the
        authentication for the dashboard; absent: as Ray's own client does. `reports` gives what every replica says of
        itself; absent: one of them is asked. `keys` says who needs a key (a `KeyPolicy`); where everybody does, the
        operator's is read from the home.

        Raises:
            RequestError: the operator's key is not there, or others may read it.
        """
        self._home = home
        self._reports = reports or self._asked_reports
        self._control = {"dashboard_url": dashboard_url, "url": url, "keys": str(keys)}
        self.url = url.rstrip("/")
        parsed = httpx.URL(self.url)
        options = {"host": parsed.host, "port": parsed.port or 80}
        self._options = serve_options or {"proxy_location": "HeadOnly", "http_options": options}
        self._api = httpx.Client(base_url=dashboard_url.rstrip("/"), headers=(headers or ray_headers)(), timeout=30.0)
        # Each request on a connection of its own: the proxy chooses a replica anew.
        bearer = {"authorization": f"Bearer {read_key_file(home.operator_key)}"} if keys == KeyPolicy.ALL else {}
        self._http = httpx.Client(base_url=self.url, headers={"connection": "close", **bearer})

    def deploy(self, models: Iterable[ModelSpec], placement: Placement, *, timeout_s: float = 120.0) -> None:
        """Bring the application up (or to this state), and wait until every replica has loaded every version.

        Raises:
            ModelError: a version can not be loaded; what ran before goes on.
            ClusterError: Serve can not start the replicas.
        """
        self._change(self.plan(models, placement), timeout_s)

    def set_models(self, models: Iterable[ModelSpec], *, timeout_s: float = 60.0) -> None:
        """Change versions, weights and roles of the deployed application; nothing else, and nothing restarts.

        Raises:
            Unavailable: the application is not deployed.
            ModelError: a version can not be loaded; the versions before go on, in every replica.
        """
        config = copy.deepcopy(self.config())
        config["applications"][0]["deployments"][0]["user_config"] = to_user_config(models)
        self._change(config, timeout_s)

    def follow(self, records: Any, model: str) -> bool:
        """Bring the replicas to a model's versions in the registry; whether it is served at all.

        Raises:
            ModelError: as `set_models`.
        """
        with self.turn():
            served = self.models()
            if all(m.name != model for m in served):
                return False
            versions = records.versions(model)
            self.set_models([reroute(m, versions) if m.name == model else m for m in served])
            return True

    def withdraw(self, records: Any, model: str, version: int) -> bool:
        """Take a version out of the replicas, by the registry where that knows which is live; whether it was there."""
        with self.turn():
            served = self.models()
            if all(m.name != model or all(r.version != version for r in m.routes) for m in served):
                return False
            versions = records.versions(model)
            managed = any(v.stage is Stage.LIVE for v in versions)
            changed = [
                m if m.name != model else reroute(m, versions) if managed else without(m, version) for m in served
            ]
            self.set_models(changed)
            return True

    def turn(self) -> AbstractContextManager[None]:
        """Inside the block no other process changes what is served: the configuration is read and written whole."""
        return turn(self._home.locks / "served.lock")

    def plan(self, models: Iterable[ModelSpec], placement: Placement) -> dict[str, Any]:
        """The configuration that `deploy` sends."""
        actor: dict[str, Any] = {"num_cpus": placement.cpus}
        if placement.resources:
            actor["resources"] = placement.resources
        if placement.label_selector:
            actor["label_selector"] = placement.label_selector
        if placement.variables:
            actor["runtime_env"] = {"env_vars": placement.variables}
        deployment = {
            "name": DEPLOYMENT,
            **number(placement),
            # Who was held comes at once: what a replica refuses is sorted in again by the proxy, slowly.
            "max_ongoing_requests": MOST_HELD,
            "max_surge_percent": 100,  # new code comes up beside the old, which then leaves
            "ray_actor_options": actor,
            "user_config": to_user_config(models),
            "graceful_shutdown_timeout_s": GRACE_S,
            "graceful_shutdown_wait_loop_s": 0.2,
            "health_check_period_s": 1.0,
            "health_check_timeout_s": 10.0,
            "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
        }
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": IMPORT_PATH,
            "args": {
                "home": str(self._home.root),
                "keys": self._control["keys"],
                "control": {**self._control, "serve_options": self._options},
            },
            "deployments": [deployment],
        }
        return {**self._options, "applications": [application]}

    def config(self) -> dict[str, Any]:
        """The configuration that was sent last.

        Raises:
            Unavailable: the application is not deployed.
        """
        deployed = self._details().get("applications", {}).get(APPLICATION, {}).get("deployed_app_config")
        if not deployed:
            raise Unavailable(f"Serve has no application {APPLICATION!r}: deploy it first")
        return {**self._options, "applications": [deployed]}

    def models(self) -> list[ModelSpec]:
        """What the application was last told to serve; nothing if it is not deployed."""
        deployed = self._details().get("applications", {}).get(APPLICATION, {}).get("deployed_app_config")
        if not deployed:
            return []
        return list(from_user_config(deployed["deployments"][0]["user_config"]).values())

    def replicas(self) -> list[ReplicaStatus]:
        """Every replica that Serve knows, whatever its state."""
        application = self._details().get("applications", {}).get(APPLICATION, {})
        found = application.get("deployments", {}).get(DEPLOYMENT, {}).get("replicas", [])
        return [
            ReplicaStatus(
                replica_id=r["replica_id"], state=r["state"], pid=r.get("pid"), node_id=r.get("node_id") or ""
            )
            for r in found
        ]

    def flush(self, *, timeout_s: float = 30.0) -> None:
        """Have every replica ship its prediction log; afterwards lake and monitor hold all that was answered.

        Raises:
            Unavailable: a replica could not ship (its rows stay in the spool), or did not answer in time.
        """
        end_s = time.monotonic() + timeout_s
        while any(r.state == "STOPPING" for r in self.replicas()) and time.monotonic() < end_s:
            time.sleep(_POLL_S)  # it ships its log as it leaves; what it can not ship whoever is asked below does
        seen = self._visit("POST", "/raymill/flush", end_s)
        failed = [s["log"]["last_error"] for s in seen if not s["flushed"]]
        if failed:
            raise Unavailable(f"the prediction log was not shipped whole and is kept: {failed[0]}")

    def remembered(self) -> list[ModelSpec]:
        """What was served when the cluster ended otherwise than by `raymill down`, or is served; else nothing.

        Raises:
            SpecError: the file is damaged, or another version's of raymill.
        """
        try:
            return list(from_user_config(json.loads(self._home.served.read_bytes())).values())
        except FileNotFoundError:
            return []
        except ValueError as err:
            raise SpecError(f"{self._home.served} is no JSON ({err}): remove it, and serve the models anew") from err

    def forget(self) -> None:
        """Let nothing come back that was served."""
        self._home.served.unlink(missing_ok=True)

    def delete(self) -> None:
        """Take the application down."""
        self._request("DELETE", None)

    def close(self) -> None:
        """Close the connections."""
        self._api.close()
        self._http.close()

    def _change(self, config: dict[str, Any], timeout_s: float) -> None:
        before = self._details().get("applications", {}).get(APPLICATION, {}).get("deployed_app_config")
        self._put(config)
        try:
            self._wait(config, time.monotonic() + timeout_s)
        except ModelError:
            if before:
                self._put({**self._options, "applications": [before]})
            raise
        try:
            write_json(self._home.served, config["applications"][0]["deployments"][0]["user_config"])
        except OSError as err:
            raise StoreError(f"{self._home.served} can not be written ({err}): it is served, until a crash") from err

    def _put(self, config: dict[str, Any]) -> None:
        """Send it; a changing number of replicas stays what it is, and of none one is woken, to acknowledge."""
        scaled = config["applications"][0]["deployments"][0].get("autoscaling_config")
        if scaled is not None:
            running = sum(r.state == "RUNNING" for r in self.replicas())
            scaled["initial_replicas"] = min(max(running, scaled["min_replicas"], 1), scaled["max_replicas"])
        self._wait_for_turn()
        self._request("PUT", config)

    def _wait_for_turn(self) -> None:
        """Keep changes `APART_S` from each other, whichever process makes them."""
        last = self._home.locks / "served.changed"
        last.parent.mkdir(parents=True, exist_ok=True)
        if last.exists():
            time.sleep(min(max(last.stat().st_mtime + APART_S - time.time(), 0.0), APART_S))
        last.touch()

    def _wait(self, config: dict[str, Any], end_s: float) -> None:
        """Until Serve says it runs and every replica has acknowledged this `user_config`."""
        wanted = generation(config["applications"][0]["deployments"][0]["user_config"])
        told = ""
        while time.monotonic() < end_s:
            application = self._details().get("applications", {}).get(APPLICATION, {})
            told = _told(application)
            if application.get("status") == "DEPLOY_FAILED":  # UNHEALTHY passes: a killed replica is replaced
                raise ClusterError(
                    f"Serve could not bring {APPLICATION!r} up: {told}; its log is under `serve/` of Ray's"
                )
            if application.get("status") == "RUNNING" and self._acknowledged(application, wanted):
                return
            time.sleep(_POLL_S)
        raise ClusterError(f"{APPLICATION!r} is not up in time: {told}; `raymill doctor` looks at the machine")

    def _acknowledged(self, application: dict[str, Any], wanted: str) -> bool:
        """Whether every replica that Serve counts as running has said that it has applied this configuration.

        Raises:
            ModelError: one could not load a version.
        """
        replicas = application.get("deployments", {}).get(DEPLOYMENT, {}).get("replicas", [])
        running = {r["replica_id"] for r in replicas if r["state"] == "RUNNING"}
        told = [r for r in self._reports() if r.replica in running]
        if not told or len(told) < len(running) or any(r.generation != wanted for r in told):
            return False
        failed = {(name, v): why for r in told for name, f in r.failures.items() for v, why in f.items()}
        if failed:
            reasons = "; ".join(f"version {v} of {name}: {why}" for (name, v), why in failed.items())
            raise ModelError(f"not loaded, so it takes no traffic: {reasons}")
        return True

    def _asked_reports(self) -> list[Report]:
        """What the replicas say of themselves, as one of them knows; nothing while none answers."""
        try:
            answer = self._http.get("/raymill/replicas", timeout=5.0)
        except httpx.TransportError:  # the proxy is not up yet, or the replica is just leaving
            return []
        return [Report.from_json(r) for r in answer.json()["replicas"]] if answer.status_code == 200 else []

    def _visit(self, method: str, path: str, end_s: float) -> list[dict[str, Any]]:
        """The same request to every replica: a new connection each time, until as many have answered as run."""
        seen: dict[str, dict[str, Any]] = {}
        running = sum(r.state == "RUNNING" for r in self.replicas())
        while time.monotonic() < end_s:
            try:
                answer = self._http.request(method, path, timeout=max(1.0, end_s - time.monotonic()))
                if answer.status_code == 200:
                    state = answer.json()
                    new = state["replica"] not in seen
                    seen[state["replica"]] = state
                    if len(seen) >= max(running, 1):
                        return list(seen.values())
                    if new:
                        continue
            except httpx.TransportError:
                pass  # the proxy is not up yet, or a replica is just leaving
            time.sleep(_POLL_S)
            running = sum(r.state == "RUNNING" for r in self.replicas())
        raise Unavailable(f"{len(seen)} of {running} replicas answered {method} {path}: see `serve status`")

    def _details(self) -> dict[str, Any]:
        return dict(self._request("GET", None).json())

    def _request(self, method: str, document: dict[str, Any] | None) -> httpx.Response:
        try:
            answer = self._api.request(method, _API, json=document)
        except httpx.TransportError as err:
            raise Unavailable(f"Ray's dashboard at {self._api.base_url} does not answer ({err}): `raymill up`") from err
        if answer.status_code in (401, 403):
            raise Unavailable(f"Ray's dashboard refuses us ({answer.text.strip()}): set RAY_AUTH_TOKEN_PATH")
        if answer.status_code != 200:
            raise ClusterError(f"Serve refuses the configuration ({answer.status_code}): {answer.text.strip()[:2000]}")
        return answer


def number(placement: Placement) -> dict[str, Any]:
    """How many replicas, in the words of Serve's configuration."""
    if not placement.autoscaling:
        return {"num_replicas": placement.replicas}
    scaled = copy.deepcopy(placement.autoscaling)
    if placement.prepare:
        scaled["policy"]["policy_kwargs"]["prepared"] = placement.variables
    return {"autoscaling_config": scaled, **HELD}


def ray_headers() -> dict[str, str]:
    """The headers that Ray's own clients send: the token where token authentication is on."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    return dict(get_auth_headers_if_auth_enabled({}))


def _told(application: dict[str, Any]) -> str:
    deployment = application.get("deployments", {}).get(DEPLOYMENT, {})
    parts = (application.get("status", "absent"), application.get("message"), deployment.get("message"))
    return ": ".join(p.strip()[-1500:] for p in parts if p)
