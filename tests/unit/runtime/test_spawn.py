"""What an error of another process is in one line."""

from raymill.runtime.spawn import in_short

TRACE = """The actor died because of an error raised in its creation task,
\x1b[36mray::features/x:FeatureActor.__init__()\x1b[39m
                  ^^^^^^^^^^^^^^^
  File "/somewhere/online.py", line 35, in <module>
    raise SpecError("feature: no")
raymill.runtime.errors.SpecError: window '5x' is no span
  of time
"""


def test_of_a_trace_only_what_was_raised_is_told():
    assert in_short(RuntimeError(TRACE)) == "raymill.runtime.errors.SpecError: window '5x' is no span"


def test_what_is_no_trace_is_told_whole_on_one_line():
    assert in_short(ValueError("a\n\tb: c")) == "ValueError: a; b: c"
    assert in_short(KeyError("x")) == "KeyError: 'x'"
