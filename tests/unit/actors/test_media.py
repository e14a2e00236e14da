"""Media are what their bytes say, or refused with the reason; they come through lake and training set unchanged."""

import hashlib
import io
import json
import tempfile
import wave

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from raymill.actors.contract import arrow_schema, check
from raymill.actors.data import DataActor
from raymill.actors.features import FeatureActor
from raymill.actors.lake import Lake
from raymill.actors.media import sniffed
from raymill.actors.quarantine import MEDIA as KEPT
from raymill.actors.training_data import columns_of
from raymill.cluster.spec import load_config
from raymill.jobs.planning import plan_run
from raymill.runtime.errors import ContractError, SpecError, StoreError, TrainingError
from raymill.runtime.expressions import col
from raymill.runtime.spec import Col, Cost, FeatureView, Label, Monitor, Pipeline, Source, Train

MOMENT_US = 60_000_000


def image(kind, shade=0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(out, kind)
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(64))
    return out.getvalue()


def pixels(media: pa.Table) -> np.ndarray:
    """The model's own reader: 16 grey values of each photo, 0 where there is none."""
    rows = []
    for photo in media["photo"].to_pylist():
        grey = Image.open(io.BytesIO(photo["bytes"])).convert("L") if photo else Image.new("L", (4, 4))
        rows.append(np.asarray(grey, np.float32).ravel() / 255)
    return np.stack(rows)


PHOTO = Col(
    "media",
    nullable=True,
    media_types=("image/png", "image/jpeg"),
    max_bytes=4096,
    urls=("s3://b/", f"{tempfile.gettempdir()}/"),
)
SHOTS = Source(
    "shots",
    key=["shot"],
    time="moment",
    schema={
        "shot": Col("int64"),
        "moment": Col("timestamp"),
        "who": Col("string"),
        "x": Col("float64", ge=0),
        "photo": PHOTO,
    },
)


def pipeline(**train) -> Pipeline:
    return Pipeline(
        "shooting",
        views=[FeatureView("who", SHOTS, entity="who", features={"sum": col("x").sum("1h")})],
        label=Label("high", SHOTS, col("x") > 1),
        train=Train(lambda inputs: None, **{"media": ("photo",), "decode": pixels} | train),
        monitor=Monitor(cost=Cost(missed=2, false_alarm=1)),
    )


def shots(*photos, first=0) -> pa.Table:
    n = len(photos)
    numbers = np.arange(first, first + n)
    kind = None if any(isinstance(p, dict) for p in photos) else pa.binary()
    return pa.table(
        {
            "shot": numbers,
            "moment": pa.array(numbers * MOMENT_US).cast(pa.timestamp("us", "UTC")),
            "who": ["a"] * n,
            "x": pa.array(np.arange(n) % 4 * 1.0),
            "photo": pa.array(list(photos), kind),
        }
    )


def started(home) -> DataActor:
    actor = DataActor(str(home), [SHOTS], lambda events: None)
    actor.start()
    return actor


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_images_are_told_by_their_bytes(kind):
    assert sniffed(image(kind)) == f"image/{kind}"


def test_sounds_texts_and_what_is_neither_are_told_by_their_bytes():
    heads = {"audio/flac": b"fLaC", "audio/ogg": b"OggS", "audio/mpeg": b"ID3", "application/pdf": b"%PDF-1.7"}
    for kind, head in heads.items():
        assert sniffed(head + b"\x00\xff") == kind
    assert sniffed(sound()) == "audio/wav"
    assert sniffed(b"\x00\x00\x00\x20ftypM4A \x00") == "audio/mp4"
    assert sniffed(b"\x00\x00\x00\x20ftypisom\x00") == "video/mp4"
    assert sniffed("BM, a text: ½".encode()) == "text/plain"
    assert [sniffed(b) for b in (b"", b"a\x00b", b"\xff\xfe\x00")] == [None] * 3


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='abc {}[]"é\n', min_size=1))
def test_any_plain_text_is_text(text):
    assert sniffed(text.encode()) == "text/plain"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (image("png"), ""),
        (image("gif"), "media_type:photo"),
        (b"nonsense", "media_type:photo"),
        (b"", "media_type:photo"),
        (image("png") + bytes(5000), "size:photo"),
        ({"bytes": image("png"), "sha256": sha(image("png"))}, ""),
        ({"bytes": image("png"), "sha256": sha(b"other")}, "checksum:photo"),
        ({"bytes": image("png"), "media_type": "image/jpeg"}, "media_type:photo"),
        ({"bytes": None, "url": "s3://b/p.png", "media_type": "image/png", "sha256": sha(b"p")}, ""),
        ({"bytes": None, "url": "s3://b/p.png", "media_type": "image/png", "sha256": None}, "checksum:photo"),
        ({"bytes": None, "url": "s3://b/p.png", "media_type": "image/png", "sha256": "abc"}, "checksum:photo"),
        ({"bytes": None, "url": "s3://b/p.png", "media_type": None, "sha256": sha(b"p")}, "media_type:photo"),
        ({"bytes": None, "url": "s3://c/p.png", "media_type": "image/png", "sha256": sha(b"p")}, "url:photo"),
        ({"bytes": None, "url": "s3://b/../c/p.png", "media_type": "image/png", "sha256": sha(b"p")}, "url:photo"),
        (None, ""),
        ({"bytes": None, "url": None}, ""),
    ],
    ids=range(16),
)
def test_a_value_is_taken_or_refused_with_the_reason(value, reason):
    checked = check(shots(value), SHOTS)
    assert checked.reasons.tolist() == [reason]
    data = value.get("bytes") if isinstance(value, dict) else value
    if not reason and data:
        told = {"bytes": data, "url": None, "media_type": "image/png", "sha256": sha(data)}
        assert checked.accepted["photo"].to_pylist() == [told]
    assert checked.blobs == ({sha(data): data} if reason and data is not None else {})


def test_a_value_that_may_not_lack_is_null_without_bytes_and_url_and_texts_take_their_columns_type():
    schema = {"id": Col("int64"), "t": Col("timestamp"), "note": Col("media", media_types=("text/html",))}
    notes = Source("notes", key=["id"], time="t", schema=schema)
    times = pa.array([0, 0], pa.timestamp("us", "UTC"))
    checked = check(pa.table({"id": [1, 2], "t": times, "note": pa.array([b"<p>", None], pa.binary())}), notes)
    assert checked.reasons.tolist() == ["", "null:note"]
    assert checked.accepted["note"].to_pylist()[0]["media_type"] == "text/html"
    with pytest.raises(ContractError, match="'note'"):
        check(pa.table({"id": [1], "t": times[:1], "note": ["a text"]}), notes)


def test_refused_media_keep_their_bytes_apart_and_come_in_mended(tmp_path):
    actor, large = started(tmp_path), image("png") + bytes(100_000)
    actor.ingest("shots", shots(image("png", 1), large, large, image("gif")), batch_id="a")
    assert max(len(e.row) for e in actor.quarantine()) < 500
    assert sorted(Lake(tmp_path / "lake").read(KEPT)["sha256"].to_pylist()) == sorted([sha(large), sha(image("gif"))])
    gif, *big = sorted(actor.quarantine(), key=lambda e: e.reason)
    named = json.loads(gif.row)["photo"]
    assert (named["blob"], named["size"]) == (sha(image("gif")), len(image("gif")))
    actor.fix({gif.id: {"photo": image("png", 9)}, big[0].id: {"photo": {"blob": "lost"}}, big[1].id: {"x": 7}})
    (done,) = actor.reingest([gif.id, *(e.id for e in big)])
    assert (done.accepted, done.quarantined) == (1, {"size:photo": 1, "type:photo": 1})
    held = Lake(tmp_path / "lake").read("shots")["photo"].to_pylist()
    assert {p["sha256"] for p in held} == {sha(image("png", 1)), sha(image("png", 9))}
    # nothing was lost on the way: with a wider contract the large ones come in as they came
    wide = Source(
        "shots",
        key=["shot"],
        time="moment",
        schema=SHOTS.schema | {"photo": Col("media", nullable=True, media_types=("image/png",))},
    )
    wider = DataActor(str(tmp_path), [wide], lambda events: None)
    assert wider.reingest([big[1].id])[-1].rows_ref["photo"].to_pylist()[0]["bytes"] == large


def test_media_come_into_training_batches_as_they_were_at_the_pinned_version(tmp_path):
    actor = started(tmp_path)
    photos = [image("png", shade) for shade in range(0, 80, 10)]
    actor.ingest("shots", shots(*photos), batch_id="a")
    features = FeatureActor(str(tmp_path), pipeline(), lambda events: None)
    made = features.training_set(0, 10**12, 10**12, 6 * MOMENT_US)
    actor.ingest("shots", shots(image("jpeg"), first=100), batch_id="b")
    again = features.training_set(0, 10**12, 10**12, 6 * MOMENT_US, made.manifest.lake_versions)
    assert again.train_ref.equals(made.train_ref) and again.evaluate_ref.num_rows == 2
    assert [p["bytes"] for p in made.train_ref["photo"].to_pylist()] == photos[:6]
    x, _ = columns_of(made.train_ref, pipeline().train)
    assert x.shape == (6, 1 + 16) and x.dtype == np.float32
    assert x[:, 1].tolist() == pytest.approx([shade / 255 for shade in range(0, 60, 10)])
    assert columns_of(made.train_ref)[0].tolist() == x[:, :1].tolist()
    features.stop()


def test_media_by_url_are_read_where_they_lie_and_held_against_their_checksum(tmp_path):
    photo, place = image("png", 5), tmp_path / "photo.png"
    place.write_bytes(photo)
    told = {"bytes": None, "media_type": "image/png", "sha256": sha(photo)}
    rows = [told | {"url": f"file://{place}"}, told | {"url": str(place)}, None, {"bytes": image("png"), "url": None}]
    schema = arrow_schema(SHOTS)
    started(tmp_path).ingest("shots", check(shots(*rows), SHOTS).accepted.cast(schema), batch_id="a")
    features = FeatureActor(str(tmp_path), pipeline(), lambda events: None)
    made = features.training_set(0, 10**12, 10**12, 10**12)
    held = made.train_ref["photo"].to_pylist()
    assert [p and p["bytes"] for p in held] == [photo, photo, None, image("png")]
    place.write_bytes(b"other")
    with pytest.raises(StoreError, match="other bytes"):
        features.training_set(0, 10**12, 10**12, 10**12)
    place.unlink()
    with pytest.raises(StoreError, match=r"photo\.png"):
        features.training_set(0, 10**12, 10**12, 10**12)
    features.stop()


@pytest.mark.parametrize(
    ("decode", "told"),
    [
        (lambda media: 1 / 0, "ZeroDivisionError"),
        (lambda media: np.zeros((len(media), 2)), "float64"),
        (lambda media: np.zeros((1, 2), np.float32), r"\(1, 2\) for 3 rows"),
        (lambda media: np.zeros(len(media), np.float32), "shape|for 3 rows"),
    ],
)
def test_a_reader_of_media_that_gives_something_else_is_told(decode, told):
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3, np.float32)), 1)
    table = pa.table({"x": x, "y": np.zeros(3, np.float32), "photo": [None] * 3})
    with pytest.raises(TrainingError, match=told):
        columns_of(table, Train(lambda n: None, media=("photo",), decode=decode))
    with pytest.raises(ContractError, match="photo"):
        columns_of(table.drop(["photo"]), Train(lambda n: None, media=("photo",), decode=pixels))


def test_what_media_are_not_for_is_refused_where_it_is_written():
    for wrong, told in [
        ({"dtype": "media"}, "media_types"),
        ({"dtype": "string", "media_types": ("image/png",)}, "media_types"),
        ({"dtype": "media", "media_types": ("image/heic",)}, "heic"),
        ({"dtype": "media", "media_types": ("image/png",), "references": "a.b"}, "refer"),
        ({"dtype": "media", "media_types": ("image/png",), "urls": ("https://host",)}, "folder"),
        ({"dtype": "string", "urls": ("https://host/",)}, "media"),
    ]:
        with pytest.raises(ValidationError, match=told):
            Col(**wrong)
    with pytest.raises(ValidationError, match="key columns"):
        Source("shots", key=["photo"], time="moment", schema=SHOTS.schema)
    with pytest.raises(ValidationError, match="media"):
        FeatureView("who", SHOTS, entity="who", features={"last": col("photo")})
    with pytest.raises(ValidationError, match="belong together"):
        Train(lambda inputs: None, media=("photo",))
    with pytest.raises(ValidationError, match="'x'"):
        pipeline(media=("x",))
    with pytest.raises(SpecError, match="served"):
        plan_run(pipeline(), load_config())
