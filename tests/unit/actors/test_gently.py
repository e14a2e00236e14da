"""What loads beside traffic: libraries are open before their import, and are opened while other threads have Python."""

import gc
import subprocess
import sys

import pytest

from raymill.actors.gently import LIBRARIES, beside_traffic, libraries

OPENS = """
import ctypes, sys, threading, time
from raymill.actors import gently

def gaps(ends):
    last = time.perf_counter()
    while not ends.is_set():
        time.sleep(0.0005)
        now = time.perf_counter()
        found.append(now - last)
        last = now

found, ends = [], threading.Event()
ticks = threading.Thread(target=gaps, args=(ends,))
ticks.start()
time.sleep(0.02)
found.clear()
begun = time.perf_counter()
for library in gently.libraries("torch", gently.LIBRARIES["torch"]):
    assert OPEN(library), library
took = time.perf_counter() - begun
ends.set()
ticks.join()
assert "torch" not in sys.modules
assert "libtorch_cpu" in open("/proc/self/maps").read()
print(max(found, default=took) / took)
"""
IMPORTS = """
import sys
from raymill.actors import gently

opened = []
gently.open_unlocked = lambda library: opened.append(library.name) or "colorsys" in sys.modules
gently.LIBRARIES = {"colorsys": ("*",)}
gently.libraries = lambda package, patterns: [gently.Path(package)] if patterns else []
with gently.beside_traffic():
    import colorsys
    import quopri
print(opened)
"""


def held(how: str) -> float:
    """The longest that another thread had to wait, as a share of the time that opening torch's libraries took."""
    code = OPENS.replace("OPEN(library)", how)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_libraries_are_opened_while_another_thread_has_python():
    """Beside it what the import does: the other thread waits from beginning to end."""
    assert held("gently.open_unlocked(library)") < 0.5
    assert held("ctypes.CDLL(str(library))") > 0.7


def test_whoever_imports_a_package_its_libraries_are_opened_first_and_once():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['colorsys']"


@pytest.mark.parametrize("package", sorted(LIBRARIES))
def test_the_libraries_that_are_named_are_there(package):
    """A release that calls them otherwise would be imported as ever, with the pause."""
    found = libraries(package, LIBRARIES[package])
    assert len(found) == len(LIBRARIES[package])


def test_afterwards_the_process_is_as_it_was():
    interval_s, portions = sys.getswitchinterval(), gc.get_threshold()
    with pytest.raises(ZeroDivisionError), beside_traffic():
        assert sys.getswitchinterval() < interval_s
        assert gc.get_threshold()[0] <= portions[0]
        raise ZeroDivisionError
    assert (sys.getswitchinterval(), gc.get_threshold()) == (interval_s, portions)
