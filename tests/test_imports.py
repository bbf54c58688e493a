"""The architecture: lissa is pure and needs torch alone; imports run one way, bridge -> lissa."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names)
LISSA = sorted(path for path in (ROOT / "lissa").rglob("*.py") if "testing" not in path.parts)
TESTING = sorted((ROOT / "lissa" / "testing").rglob("*.py"))
BRIDGE = sorted((ROOT / "bridge").rglob("*.py"))


def imports(path: Path, top_level_only: bool = False):
    """Names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", LISSA, ids=lambda p: p.name)
def test_lissa_imports_torch_alone(path):
    assert {name.split(".")[0] for name in imports(path)} - STANDARD <= {"torch", "functorch", "lissa"}


@pytest.mark.parametrize("path", TESTING, ids=lambda p: p.name)
def test_lissa_testing_adds_hypothesis(path):
    assert {name.split(".")[0] for name in imports(path, True)} - STANDARD <= {
        "torch",
        "functorch",
        "lissa",
        "hypothesis",
    }


@pytest.mark.parametrize("path", BRIDGE, ids=lambda p: p.name)
def test_bridge_uses_public_names_of_lissa(path):
    import lissa

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lissa":
            assert {alias.name for alias in node.names} <= set(lissa.__all__)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert not node.module.startswith("lissa.") or not node.module.split(".")[-1].startswith("_")


@pytest.mark.parametrize("path", LISSA, ids=lambda p: p.name)
def test_lissa_neither_prints_nor_reads_files_nor_waits_for_the_device(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {f.id for f in calls if isinstance(f, ast.Name)} & {"print", "open", "input", "tqdm"}
    assert not {f.attr for f in calls if isinstance(f, ast.Attribute)} & {"item", "cpu", "numpy", "manual_seed"}


@pytest.mark.parametrize("path", LISSA + BRIDGE, ids=lambda p: p.name)
def test_no_assert_statements(path):
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", LISSA + TESTING + BRIDGE, ids=lambda p: p.name)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_importing_lissa_loads_no_extra():
    code = "import sys, lissa; print(*{'hypothesis', 'bridge', 'sklearn', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_every_public_function_and_class_is_documented():
    import lissa

    assert lissa.__all__ == sorted(lissa.__all__)
    for name in lissa.__all__:
        value = getattr(lissa, name)
        assert not inspect.isroutine(value) or inspect.getdoc(value), name
