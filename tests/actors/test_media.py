"""A gang trains on what lies in photos alone: media reach the ranks, and the program takes what was decoded."""

import logging

import numpy as np
import pyarrow as pa
import pytest
import ray

from raymill.actors.media import MEDIA
from raymill.actors.program import load_program
from raymill.actors.training import Gang
from raymill.runtime.messages import TrainingSet
from raymill.runtime.spec import Train
from tests.actors.test_training import Pool, a_set

ROWS = 4000


def net(inputs: int):
    """A line through 2 features and 4 decoded values."""
    import torch

    assert inputs == 6
    return torch.nn.Sequential(torch.nn.Linear(inputs, 1), torch.nn.Flatten(0))


def brightness(media: pa.Table) -> np.ndarray:
    """The 4 bytes of each photo as numbers."""
    import numpy

    return numpy.array([list(p["bytes"]) for p in media["photo"].to_pylist()], numpy.float32)


def table(seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    x, shades = random.normal(size=(ROWS, 2)).astype(np.float32), random.integers(0, 256, (ROWS, 4))
    photos = [{"bytes": bytes(s), "url": None, "media_type": "image/png", "sha256": ""} for s in shades.tolist()]
    return pa.table(
        {
            "x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 2),
            "y": pa.array((shades[:, 0] > 127).astype(np.float32)),
            "photo": pa.array(photos, MEDIA),
        }
    )


@pytest.mark.soak
def test_a_gang_learns_what_only_the_photos_tell(tmp_path):
    ray.init(address="local", include_dashboard=False, num_cpus=3, logging_level=logging.ERROR)
    pool = Pool()
    train = Train(net, epochs=8, batch_rows=256, ranks=2, learning_rate=0.05, media=("photo",), decode=brightness)
    gang = Gang(pool, train, owner="run-1", checkpoint_dir=tmp_path, record=lambda events: None)
    rows = TrainingSet(manifest=a_set().manifest, train_ref=table(1), evaluate_ref=table(2))
    try:
        result = gang.fit(rows, training_id="photos")
    finally:
        gang.close()
        ray.shutdown()
    assert result.epochs[-1].evaluate_auc > 0.97
    told = load_program(result.program)(np.array([[0, 0, 0, 9, 9, 9], [0, 0, 255, 9, 9, 9]], np.float32))
    assert told[0] < 0.2 < 0.8 < told[1]
