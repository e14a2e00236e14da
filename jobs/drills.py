"""Faults brought about on purpose while a run goes on: a spot node reclaimed, a replica killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raymill.jobs.replay import iso_date
from raymill.jobs.run import Run
from raymill.jobs.world import World

RECLAIM_TRACE = ({"at_s": 0.0, "available": False, "notice_s": 1.5}, {"at_s": 20.0, "available": True})
"""The market of the spot drill: all spot nodes go with 1.5 s of notice, and 20 s later there are some again."""

Say = Callable[[str], None]
Tick = Callable[[str, int, int, str], None]


class Drilled:
    """The drills of one run; each is done once, however often the run is taken up."""

    def __init__(self, world: World, run: Run, say: Say) -> None:
        self._world, self._run, self._say = world, run, say
        self._declared = world.pipeline.replay.drills if world.pipeline.replay else None
        if self._wants_reclaim and world.cluster is None:
            self._skip("spot drill: this cluster has no spot market (it was not started by `raymill up`)")

    def on_step(self, tick: Tick) -> Callable[[str, int, int], None]:
        """What a training calls after each chunk: moves the bar, and takes the spot node away in a retrain."""

        def stepped(training_id: str, done: int, of: int) -> None:
            tick("train", done, of, f"{len(self._world.gang)} ranks")
            if self._may_reclaim(training_id):
                self._run.progress.drills["spot"] = {"training_id": training_id, "at_step": done, "wall_s": time.time()}
                self._run.save()
                self._say(f"drill: the spot market takes its nodes back (step {done} of {of})")
                self._world.cluster.replay(list(RECLAIM_TRACE))

        return stepped

    @contextmanager
    def on_day(self, day: int, served: Callable[[], int]) -> Iterator[None]:
        """Around the requests of a day: kills the replica at their beginning, on the day that was declared.

        `served` gives the number of requests answered so far.
        """
        due = self._declared is not None and self._declared.kill_replica_on == iso_date(day)
        if not due or "replica" in self._run.progress.drills:
            yield
            return
        retried, before = self._world.client.retried, served()
        victim = next((r for r in self._world.endpoint.replicas() if r.state == "RUNNING" and r.pid), None)
        if victim is None or victim.pid is None:
            self._skip("replica drill: Serve shows no running replica")
            yield
            return
        began = time.monotonic()
        self._say(f"drill: SIGKILL to replica {victim.replica_id} (pid {victim.pid})")
        os.kill(victim.pid, signal.SIGKILL)
        yield
        self._run.progress.drills["replica"] = {
            "date": iso_date(day),
            "pid": victim.pid,
            "requests": served() - before,
            "retried": self._world.client.retried - retried,
            "seconds": round(time.monotonic() - began, 3),
        }

    @property
    def _wants_reclaim(self) -> bool:
        return bool(self._declared and self._declared.reclaim_spot and self._world.pipeline.train.spot)

    def _may_reclaim(self, training_id: str) -> bool:
        """In the first retrain (not the first model, so that something is served meanwhile) that has two ranks."""
        first = training_id == self._run.progress.drills.setdefault("first_training", training_id)
        wanted = self._wants_reclaim and self._world.cluster is not None and "spot" not in self._run.progress.drills
        return wanted and not first and len(self._world.gang) > 1

    def _skip(self, why: str) -> None:
        if why not in self._run.progress.skipped:
            self._run.progress.skipped.append(why)
