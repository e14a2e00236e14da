"""The rules of the house that a machine can hold: who imports whom, what stays light, who may touch what."""

import ast
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from raymill.runtime import errors

ROOT = Path(__file__).parents[2]
FOLDERS = ("runtime", "actors", "cluster", "jobs")
MAY_IMPORT = {
    "runtime": {"runtime"},
    "actors": {"actors", "runtime"},
    "cluster": {"cluster", "runtime"},
    "jobs": {"jobs", "actors", "cluster", "runtime"},
}
SETS_RAY_VARIABLES = {
    "cluster/environment.py",  # what `raymill up` sets, for everything on its cluster
    "cluster/session.py",
    "cluster/start.py",
    "cluster/attach.py",  # the token's mode of a cluster that is found
    "cluster/providers/local.py",  # a worker node's own identity
    "cluster/providers/namespace.py",
}


@cache
def modules():
    """Path below the root → nodes of its syntax tree, the module first, for every module that is installed."""
    files = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*.py"))]
    return {str(f.relative_to(ROOT)): list(ast.walk(ast.parse(f.read_text()))) for f in files}


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def where(found):
    """Modules in which `found` holds for some node of the tree."""
    return {path for path, nodes in modules().items() if any(found(node) for node in nodes)}


def test_imports_point_down():
    wrong = [
        f"{path} imports {name}"
        for path, nodes in modules().items()
        for name in imports(nodes)
        if name.startswith("raymill.") and name.split(".")[1] not in MAY_IMPORT[path.split("/")[0]]
    ]
    assert wrong == []


def test_nobody_imports_our_folders_by_their_bare_names():
    wrong = [
        f"{path} imports {name}"
        for path, nodes in modules().items()
        for name in imports(nodes)
        if name.split(".")[0] in FOLDERS
    ]
    assert wrong == []


def test_every_module_says_what_it_is():
    assert [path for path, nodes in modules().items() if not ast.get_docstring(nodes[0])] == []


@pytest.mark.parametrize("module", ["raymill.runtime", "raymill.runtime.spec", "raymill.runtime.client"])
def test_light_modules_stay_light(module):
    heavy = ("ray", "torch", "deepspeed", "numba", "sklearn", "deltalake")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def tree_of(cls):
    return [cls, *(sub for direct in cls.__subclasses__() for sub in tree_of(direct))]


@pytest.mark.parametrize("cls", tree_of(errors.RaymillError), ids=lambda c: c.__name__)
def test_every_error_survives_pickling_and_speaks(cls):
    came_back = pickle.loads(pickle.dumps(cls("what, where, what to do")))
    assert type(came_back) is cls and came_back.message == "what, where, what to do"
    assert 400 <= cls.http_status < 600 and cls.remedy and came_back.code.islower()


def test_the_tree_of_errors_is_drawn_whole():
    for cls in tree_of(errors.RaymillError):
        assert f"{cls.__name__} " in errors.__doc__ or f"{cls.__name__}\n" in errors.__doc__
        assert f"  {cls.http_status}  " in errors.__doc__ or f"  {cls.http_status}\n" in errors.__doc__


def attribute_of(node, owner, *names):
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        and node.attr in names
    )


def test_ray_is_applied_to_classes_in_one_place():
    assert where(lambda node: attribute_of(node, "ray", "remote")) <= {"runtime/spawn.py"}
    assert where(lambda node: attribute_of(node, "serve", "deployment", "ingress")) <= {
        "runtime/spawn.py",
        "actors/serving.py",  # Serve imports an application by its path
    }


def is_text(node, test):
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and test(node.value)


def sets_ray_variable(node):
    """A dict entry, an assignment to an item, or a keyword that names a RAY_ variable."""

    def ray(text):
        return text.startswith("RAY_")

    if isinstance(node, ast.Dict):
        return any(is_text(k, ray) for k in node.keys)
    if isinstance(node, ast.Subscript):
        return isinstance(node.ctx, ast.Store) and is_text(node.slice, ray)
    if isinstance(node, ast.Call):
        setter = isinstance(node.func, ast.Attribute) and node.func.attr in ("setdefault", "putenv")
        return (setter and any(is_text(a, ray) for a in node.args)) or any(ray(k.arg or "") for k in node.keywords)
    return False


def test_only_up_sets_rays_variables():
    assert where(sets_ray_variable) <= SETS_RAY_VARIABLES


def reads_home(node):
    """`….get(RAYMILL_HOME)`, `os.getenv(…)` or `os.environ[…]`, by text or by the constant's name."""

    def home(arg):
        named = (isinstance(arg, ast.Name) and arg.id == "HOME_VARIABLE") or attribute_of(arg, "home", "HOME_VARIABLE")
        return named or is_text(arg, lambda text: text == "RAYMILL_HOME")

    if isinstance(node, ast.Call):
        reader = isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "getenv")
        return reader and any(home(a) for a in node.args)
    return isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and home(node.slice)


def test_one_module_reads_where_the_home_is():
    assert where(reads_home) <= {"runtime/home.py"}
