"""Loading a model beside running traffic: nobody waits for Python's lock (the GIL) longer than he must.

`import torch` alone holds the lock for a quarter of a second on end, nearly all of it while the system's loader maps
and links its shared libraries, which needs no Python. So they are opened first, by a foreign call, which lets the
lock go (`ctypes.CDLL(path)` does not); the import finds them open. What is left is Python code, which another thread
may interrupt, as often as `SWITCH_S` says. Garbage is looked for in small portions meanwhile: an import makes half a
million objects, and a look at them in one go takes as long as the libraries did.

Invariants
- Only libraries that are named here are opened so: of those it is known that nothing in them needs the lock when
  they are opened. Whoever imports them, a program or the code of a user, they are opened once.
- What can not be opened is left to the import, whose error says more.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

SWITCH_S = 0.0001
"""For how long who loads may hold Python while callers wait; a replica's own threads may for longer, and seldom do."""
GC_THRESHOLD = 2_000
"""Objects between two looks for garbage while something loads."""
_GLOBAL = "libtorch_global_deps.so"
"""Opened with its names for all to see, as torch does it."""
LIBRARIES = {
    "torch": (f"lib/{_GLOBAL}", "lib/libtorch_python.so"),
    "onnxruntime": ("capi/onnxruntime_pybind11_state*.so",),
    "xgboost": ("lib/libxgboost.so",),
    "lightgbm": ("lib/lib_lightgbm.so",),
}
"""Package → its shared libraries in its folder; what they need is opened with them."""
_loading = threading.Lock()


@contextmanager
def beside_traffic() -> Iterator[None]:
    """In the block (of one thread at a time) imports and computation let other threads in as soon as they may."""
    with _loading:
        if not any(isinstance(finder, _Opener) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Opener())
        interval_s, portions = sys.getswitchinterval(), gc.get_threshold()
        sys.setswitchinterval(min(interval_s, SWITCH_S))
        gc.set_threshold(min(portions[0], GC_THRESHOLD), *portions[1:])
        try:
            yield
        finally:
            gc.set_threshold(*portions)
            sys.setswitchinterval(interval_s)


class _Opener(MetaPathFinder):
    """Finds no module; it opens a package's libraries when somebody is about to import it."""

    def __init__(self) -> None:
        self._unopened = {name: patterns for name, patterns in LIBRARIES.items() if name not in sys.modules}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Never one."""
        for library in libraries(fullname, self._unopened.pop(fullname, ())):
            open_unlocked(library)
        return None


def libraries(package: str, patterns: Sequence[str]) -> list[Path]:
    """The files that a package has of these, in this order; it is not imported."""
    spec = PathFinder.find_spec(package) if patterns else None
    folders = (spec and spec.submodule_search_locations) or []
    return [found for folder in folders for pattern in patterns for found in sorted(Path(folder).glob(pattern))]


def open_unlocked(library: Path) -> bool:
    """Open a shared library while other threads have Python; whether it could be."""
    flags = os.RTLD_NOW | (os.RTLD_GLOBAL if library.name == _GLOBAL else os.RTLD_LOCAL)
    opened = ctypes.CDLL(None).dlopen  # a function of ctypes lets the lock go while it runs
    opened.restype, opened.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    return bool(opened(os.fsencode(library), flags))
