"""The whole loop, each actor met once, in the order of the data: read this second, after `jobs/flights.py`.

Everything in it may be done twice: batches, predictions, trainings and versions carry ids that are the same each
time, so a run that was killed anywhere is taken up from its last saved day, and nothing is lost or doubled.
"""

from __future__ import annotations

from collections.abc import Callable

from raymill.jobs.asking import Asking
from raymill.jobs.correction import Correction
from raymill.jobs.drills import Drilled
from raymill.jobs.feature_watch import check_served, register_features
from raymill.jobs.replay import DAY_US, Batch, Recording, iso_date
from raymill.jobs.run import Run
from raymill.jobs.world import World, recorded

Say = Callable[[str], None]
Tick = Callable[[str, int, int, str], None]
"""(stage, done, of how many, note): moves a progress bar."""


def run_loop(world: World, run: Run, say: Say, tick: Tick) -> Recording:
    """From recorded rows to a settled endpoint; `run.progress` says where to begin. What was replayed comes back.

    Raises:
        RaymillError: a stage failed for good; the run can be taken up again.
    """
    for warning in register_features(world):
        say(f"warning: {warning}")
    with run.stage("read"):
        recording = recorded(world.pipeline)
    drills = Drilled(world, run, say)
    correction = Correction(world, run, say, on_step=drills.on_step(tick))

    if run.progress.next_day is None:
        with run.stage("ingest"):  # stop 1: rows into the lake
            for batch in recording.history():
                say(f"history of {batch.source}: {batch.rows.num_rows:,} rows")
                world.data.ingest(batch.source, batch.rows, batch_id=batch.batch_id)
        with run.stage("features"):  # stop 2: the online store, as it was when the replay begins
            world.features.rebuild(recording.start)
        run.progress.next_day = recording.start
    with run.stage("train"):  # stops 3 and 4: leases, the gang, the first versions
        correction.first_live(recording.start)
    with run.stage("serve"):  # stop 5: the endpoint, with whatever the registry says is live
        world.deploy()
    with run.stage("train"):
        correction.begin(recording.start)

    with run.stage("replay"):
        replay_days(world, run, recording, correction, drills, tick)
    with run.stage("settle"):  # stop 6 is met in `correction`: verdict, retrain, canary, promote or roll back
        correction.settle(recording.end)
        world.flush_predictions()
    with run.stage("consistency"):  # what was served, against the lake
        say(f"consistency: {check_served(world, run).reason}")
    return recording


def replay_days(
    world: World, run: Run, recording: Recording, correction: Correction, drills: Drilled, tick: Tick
) -> None:
    """A day's rows first, then its requests, then what the monitor makes of them."""
    asking = Asking(world, run)
    days = recording.days(run.progress.next_day)
    total = len(recording.days())
    for day in days:
        world.features.replay_to(day + DAY_US)
        for batch in recording.batches(day):
            ingest(world, run, batch, day)
        with drills.on_day(day, lambda: asking.served):
            for request in recording.requests(day, run.id):
                asking.ask(request)
        correction.day_passed(day + DAY_US, recording.start)
        run.progress.next_day = day + DAY_US
        asking.note(run.progress)
        run.save()
        tick("replay", total - len(recording.days(day + DAY_US)), total, f"{iso_date(day)}  {correction.state.phase}")


def ingest(world: World, run: Run, batch: Batch, day: int) -> None:
    """One batch from the source to the lake, the online store and, where it carries labels, the monitor."""
    done = world.data.ingest(batch.source, batch.rows, batch_id=batch.batch_id, at=day + DAY_US)
    world.features.ingest(batch.source, done.rows_ref, batch_id=f"{run.id}/{batch.batch_id}")
    if batch.source == world.pipeline.label.source.name:
        world.monitor.labels(done.rows_ref)
