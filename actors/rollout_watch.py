"""The actor `rollouts`: hears from every replica, and takes a version that has to go out of registry and replicas.

The first replica that starts brings it up; its name makes it the only one that decides. Invariants
- It runs the code of the replica that started last: one of other code is ended, and a new one brought up.
- Registry first, then the replicas by `user_config`. Killed in between it hears from the replicas of the same version
  again, finds the registry changed, and brings the replicas to it; each step may be made twice.
- It holds nothing that is not told again: what a version did lately is counted in the replicas.
- A version that is live because of a roll back by this actor is not rolled back by it: it never goes further than one
  version back on its own, and never back from one that was promoted long ago.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymill.actors.endpoint import Endpoint
from raymill.actors.version_health import PROBATION_S, Report, Withdrawal, withdrawals
from raymill.runtime.errors import Conflict, RaymillError, Unavailable
from raymill.runtime.home import Home
from raymill.runtime.messages import Event, ModelVersion, Stage
from raymill.runtime.records import RemoteRecords

_log = logging.getLogger(__name__)

NAME = "rollouts"
"""The actor's name in Ray."""
AUTOMATIC = "automatic: "
"""Begins the reason of what this actor does, in ledger and registry."""
FRESH_S = 5.0
"""How old a report may be to count for a decision."""
_KEPT_S = 60.0
_LOOK_S = 0.25
_ANSWERS_S = 60.0


class RolloutWatch:
    """Hears reports, decides, acts; a plain class that works without Ray."""

    def __init__(self, home: str | Path, control: dict[str, Any], *, records: Any = None, endpoint: Any = None) -> None:
        """`control` are `Endpoint`'s places, as the application's arguments hold them.

        `records` and `endpoint` stand for the real ones in tests.
        """
        self._home, self._control = Home(Path(home)), control
        self._records = records if records is not None else RemoteRecords()
        self._endpoint = endpoint
        self._code = code_on_disk()
        self._told: dict[str, tuple[float, Report]] = {}
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to decide."""
        if self._endpoint is None:
            self._endpoint = Endpoint(**self._control, home=self._home, reports=self.reports)
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Decide no more."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()

    def health(self) -> bool:
        """Whether it decides."""
        return self._thread is not None and self._thread.is_alive()

    def code(self) -> str:
        """`code_on_disk` when it was started."""
        return self._code

    def report(self, told: Report) -> None:
        """A replica says how it is."""
        self._told[told.replica] = (time.monotonic(), told)

    def reports(self, within_s: float = _KEPT_S) -> list[Report]:
        """What each replica said last, of those that spoke lately."""
        since = time.monotonic() - within_s
        return [told for at, told in list(self._told.values()) if at >= since]

    def look(self) -> None:
        """Take out what has to go."""
        for what in withdrawals(self.reports(FRESH_S)):
            self._withdraw(what)

    def _run(self) -> None:
        while not self._ends.wait(_LOOK_S):
            since = time.monotonic() - _KEPT_S
            self._told = {k: v for k, v in list(self._told.items()) if v[0] >= since}
            try:
                self.look()
            except RaymillError as err:
                _log.warning("a version was to go; it is tried again: %s", err.message)
            except Exception:  # noqa: BLE001 - edge of the actor's loop: told, and the next look comes
                _log.exception("a version was to go; it is tried again")

    def _withdraw(self, what: Withdrawal) -> None:
        version: ModelVersion = self._records.get(what.model, what.version)
        reason = AUTOMATIC + what.reason
        if version.stage is Stage.CANARY:
            self._records.reject(what.model, what.version, reason=reason)
        elif version.stage is Stage.LIVE and not self._roll_back(version, reason):
            return
        elif version.stage is Stage.CANDIDATE and not what.canary:
            return  # its replicas were told by hand what answers; there is no version before it
        if self._endpoint.withdraw(self._records, what.model, what.version):
            _log.error("version %d of %s was taken out: %s", what.version, what.model, what.reason)

    def _roll_back(self, version: ModelVersion, reason: str) -> bool:
        """Whether the replicas have to follow."""
        promoted = version.history[-1]
        if str(promoted["reason"]).startswith(AUTOMATIC) or time.time() - promoted["wall_s"] > PROBATION_S:
            return self._left(version, f"{reason}; it stays, for it was not promoted lately by anybody")
        try:
            self._records.rollback(version.model, version=version.version, reason=reason)
        except Conflict:
            return self._left(version, f"{reason}; it stays, for there is no version before it")
        return True

    def _left(self, version: ModelVersion, reason: str) -> bool:
        """Say once in the ledger that the live version is ill and stays."""
        subject = f"{version.model}/{version.version}"
        key = f"ill/{subject}/{version.history[-1]['wall_s']}"
        event = Event(
            kind="model.ill",
            subject=subject,
            pipeline=version.model,
            wall_s=time.time(),
            key=key,
            data={"reason": reason},
        )
        self._records.append([event])
        return False


class Reporter:
    """The replica's side: tells the actor `rollouts` how the replica is."""

    PERIOD_S = 0.5

    def __init__(self, home: Home, control: dict[str, Any] | None, replica: str, state: Callable[[], Report]) -> None:
        """`control` is from the application's arguments; None: there is no actor, and this replica is all there is."""
        self._home, self._control, self._state = home, control, state
        self.replica = replica
        """Serve's id of the replica; outside Serve the one given."""
        self._code = code_on_disk()
        self._watch: Any = None
        self._last: Any = None
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_alone(self) -> bool:
        """Whether there is no actor to tell."""
        return self._control is None

    def start(self) -> None:
        """Find the actor, or bring it up; begin to tell."""
        if self._control is None or self._thread is not None:
            return
        from ray import serve

        self.replica = serve.get_replica_context().replica_id.unique_id
        self._watch = bring_up(self._home, self._control)
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell no more."""
        self._ends.set()

    def now(self) -> None:
        """Tell at once; does not wait for the actor."""
        if self._watch is not None:
            self._last = self._watch.report.remote(self._state())

    def reports(self) -> list[Report]:
        """What every replica said last; waits for the actor.

        Raises:
            Unavailable: it does not answer (it is being restarted).
        """
        if self._watch is None:
            return [self._state()]
        from raymill.runtime.spawn import ask

        found: list[Report] = ask(self._watch.reports.remote(), timeout_s=5.0)
        return found

    def _run(self) -> None:
        assert self._control is not None
        self._watch = renewed(self._watch, self._code, self._home, self._control)
        while not self._ends.wait(self.PERIOD_S):
            if is_lost(self._last):  # a replica of other code has ended the actor: there is a new one
                self._watch = bring_up(self._home, self._control)
            self.now()


def code_on_disk() -> str:
    """Digest of raymill's modules as they lie on this host now: what a process that starts now runs."""
    found = hashlib.sha256()
    for folder in ("actors", "runtime"):
        for path in sorted((Path(__file__).parents[1] / folder).glob("*.py")):
            found.update(b"%s\0%d\0" % (path.name.encode(), path.stat().st_size) + path.read_bytes())
    return found.hexdigest()


def bring_up(home: Home, control: dict[str, Any]) -> Any:
    """Handle of the actor; it is started if it does not run."""
    from raymill.runtime.spawn import on_head, spawn

    return spawn(RolloutWatch, str(home.root), control, name=NAME, **on_head())


def renewed(watch: Any, code: str, home: Home, control: dict[str, Any]) -> Any:
    """Handle of the actor, which is ended and brought up anew if it runs other code than that."""
    from raymill.runtime.spawn import ask, end

    try:
        told = ask(watch.code.remote(), timeout_s=_ANSWERS_S)
    except AttributeError:
        told = ""  # it is from before it could say
    except Unavailable:
        return watch  # it is being restarted, which loads the code that is on disk
    if told == code:
        return watch
    _log.warning("the actor %s runs other code than this replica: it is brought up anew", NAME)
    end(NAME)
    return bring_up(home, control)


def is_lost(call: Any) -> bool:
    """Whether a call was not answered because its actor is no more."""
    import ray

    from raymill.runtime.spawn import ask

    if call is None or not ray.wait([call], timeout=0)[0]:
        return False
    try:
        ask(call)
    except Unavailable:
        return True
    except Exception:  # noqa: BLE001 - an actor of other code may make nothing of what it is told, until it is ended
        return False
    return False
