import json
from pathlib import Path

import pytest

from raymill.jobs import pipeline_file
from raymill.runtime.errors import SpecError

GOOD = """
from raymill.runtime import *
ROWS = Source("rows", key=["ref"], time="t", schema={"ref": Col("string"), "t": Col("timestamp"), "v": Col("float64")})
pipeline = Pipeline("demo", views=[FeatureView("past", ROWS, entity="ref", features={"m": col("v").mean("1d")})],
    label=Label("big", ROWS, col("v") > 1), train=Train(lambda n: None, config=CONFIG),
    monitor=Monitor(cost=Cost(missed=2, false_alarm=1)))
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "job.py"
    file.write_text(text)
    return file


def test_a_good_file_gives_its_pipeline_and_its_resolved_form(tmp_path):
    pipeline = pipeline_file.load(write(tmp_path, GOOD.replace("CONFIG", "None")))
    assert pipeline.name == "demo"
    spec = json.loads(pipeline_file.resolved(pipeline))
    assert spec["train"]["epochs"] == 3 and spec["views"][0]["features"]["m"][0] == "mean"


def test_the_engines_configuration_file_is_read_in(tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    pipeline = pipeline_file.load(write(tmp_path, GOOD.replace("CONFIG", "'ds.json'")))
    assert pipeline.train.config == {"gradient_clipping": 1.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "exactly one Pipeline"),
        ("import nowhere_at_all\n", "job.py:1: ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
        (GOOD.replace("CONFIG", "None").replace('time="t"', 'time="u"'), "job.py:3.*'u'"),
        (GOOD.replace("CONFIG", "None").replace('"1d"', '"1 day"'), "job.py:4.*not a duration"),
        (GOOD.replace("CONFIG", "None, epochs=0"), "epochs.*greater than"),
        (GOOD.replace("CONFIG", "None, epoch=1"), "epoch.*Unexpected keyword"),
        (GOOD.replace("CONFIG", "'gone.json'"), "gone.json is not readable JSON"),
    ],
)
def test_a_wrong_file_gives_one_error_with_place_and_field(tmp_path, text, says):
    with pytest.raises(SpecError, match=says):
        pipeline_file.load(write(tmp_path, text))


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(SpecError, match="no pipeline file"):
        pipeline_file.load(tmp_path / "none.py")
