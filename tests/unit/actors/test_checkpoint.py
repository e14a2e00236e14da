import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raymill.actors.checkpoint import CheckpointFolder, decode, encode
from raymill.runtime.errors import StoreError

arrays = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from(["<f4", "<f8", "<i8", "<u2", "|u1", "|b1"]).flatmap(
        lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    max_size=4,
)
facts = st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-(2**60), 2**60), st.text(max_size=5), st.none()))


@given(arrays, facts)
@settings(max_examples=60, deadline=None)
def test_what_is_read_is_what_was_written(given_arrays: dict[str, np.ndarray], given_facts: dict[str, object]) -> None:
    found, read_facts = decode(encode(given_arrays, given_facts))
    assert read_facts == given_facts and list(found) == list(given_arrays)
    for name, array in given_arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_damage_is_an_error_with_a_remedy_never_a_wrong_state(data: st.DataObject) -> None:
    whole = encode({"net/a": np.arange(6, dtype=np.float32), "b": np.zeros((0, 2))}, {"step": 3})
    if data.draw(st.booleans()):
        bad = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(len(whole) - 24, len(whole) - 1))
        bad = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    with pytest.raises(StoreError, match="delete it"):
        decode(bad)


def test_a_training_has_one_file_whatever_its_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "deep" / "er")
    assert folder.read("run/1 ../x") is None
    folder.write("run/1 ../x", b"one")
    folder.write("run/1 ../x", b"two")
    assert folder.read("run/1 ../x") == b"two" and folder.read("run/1") is None
    assert [p.parent for p in tmp_path.rglob("*.*")] == [tmp_path / "deep" / "er"]
    folder.forget("run/1 ../x")
    folder.forget("run/1 ../x")
    assert folder.read("run/1 ../x") is None


WRITER = """
import sys, itertools, numpy as np
from raymill.actors.checkpoint import CheckpointFolder, encode
folder = CheckpointFolder(sys.argv[1])
for step in itertools.count():
    folder.write("t", encode({"a": np.full(200_000, step, np.float32)}, {"step": step}))
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    last = -1
    for line in writer.stdout:
        last = int(line)
        if last == 20:
            os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    data = CheckpointFolder(tmp_path).read("t")
    assert data is not None
    found, read_facts = decode(data)
    assert read_facts["step"] >= last >= 20 and (found["a"] == read_facts["step"]).all()
