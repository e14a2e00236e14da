"""How a side of a benchmark answers: a process that is told tasks on stdin, one JSON line each, and says what it found.

Every side is one process, warm like the others; nothing but what is named in a task is timed. Only the standard library
and numpy: each peer runs it in a venv of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def answer(tasks: Mapping[str, Callable[[dict[str, Any]], Any]]) -> None:
    """Read a task a line: `{"task": name, …, "save": path}`; answer `seconds` and `cpu_s`, or its own figures.

    With `save` the task's result (float32 [rows, values]) is written there, after the clock has stopped.
    """
    for line in sys.stdin:
        told = json.loads(line)
        begun, used = time.perf_counter(), time.process_time()
        result = tasks[told["task"]](told)
        took = {"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - used}
        figures = result if isinstance(result, dict) else took
        if told.get("save"):
            import numpy as np

            np.save(told["save"], np.asarray(result() if callable(result) else result, dtype=np.float32))
        print(json.dumps(figures), flush=True)
