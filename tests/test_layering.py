"""Imports run one way: kernels < engine < rollout, trainer_bridge < recipes; and always by the full name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "configs": set(),
    "kernels": set(),
    "engine": {"kernels"},
    "rollout": {"kernels", "engine"},
    "trainer_bridge": {"kernels", "engine"},
    "recipes": {"kernels", "engine", "rollout", "trainer_bridge", "configs"},
    "tests": {"kernels", "engine", "rollout", "trainer_bridge", "recipes", "configs"},
}


def violations(root: Path) -> list[str]:
    """Every import under root that breaks the rules, as "file:line: what"."""
    found = []
    for layer, allowed in MAY_IMPORT.items():
        for path in sorted((root / layer).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
                found += [f"{where}: {what}" for what in _faults(node, layer, allowed)]
    return found


def _faults(node: ast.AST, layer: str, allowed: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.level:
        yield "a relative import"
        return
    for name in _imported(node):
        top, *rest = name.split(".")
        if top in MAY_IMPORT and top != "tests":
            yield f"imports {top}, not lockstep.{top}"
        elif top == "lockstep" and rest and rest[0] not in (layer, "__version__", "lazy_names", *allowed):
            yield f"{layer} imports lockstep.{rest[0]}"


def _imported(node: ast.AST) -> Iterator[str]:
    """Full names of what the node imports; `from lockstep import engine` counts as lockstep.engine."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif _is_import_call(node) and node.args and isinstance(node.args[0], ast.Constant):
        yield str(node.args[0].value)


def _is_import_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"


def test_no_import_runs_up_or_sideways():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("layer", "code", "fault"),
    [
        ("kernels", "import lockstep.engine", "kernels imports lockstep.engine"),
        ("engine", "from lockstep.rollout.sample import Sample", "engine imports lockstep.rollout"),
        ("engine", "def f():\n    from lockstep import recipes", "engine imports lockstep.recipes"),
        ("rollout", "import lockstep.trainer_bridge.algorithms.losses as l", "rollout imports lockstep.trainer_bridge"),
        ("trainer_bridge", "if 0:\n    from lockstep.rollout import worker", "trainer_bridge imports lockstep.rollout"),
        (
            "trainer_bridge",
            "importlib.import_module('lockstep.recipes.cli')",
            "trainer_bridge imports lockstep.recipes",
        ),
        ("engine", "import kernels", "imports kernels, not lockstep.kernels"),
        ("recipes", "from engine.models import decoder", "imports engine, not lockstep.engine"),
        ("kernels", "from . import linear", "a relative import"),
        ("kernels", "from .linear import linear", "a relative import"),
        ("configs", "import lockstep.kernels", "configs imports lockstep.kernels"),
        ("tests", "import rollout", "imports rollout, not lockstep.rollout"),
    ],
)
def test_a_bad_import_is_found(tmp_path, layer, code, fault):
    folder = tmp_path / layer / "inner"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(code + "\n")
    line = 1 + code.count("\n")
    assert violations(tmp_path) == [f"{layer}/inner/module.py:{line}: {fault}"]


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("engine", "from lockstep.kernels.linear.linear import linear\nimport torch.nn"),
        ("recipes", "from lockstep.trainer_bridge import publish\nfrom lockstep import rollout"),
        ("rollout", "import lockstep.rollout.sample\nimport engineering"),
    ],
)
def test_a_good_import_is_not(tmp_path, layer, code):
    (tmp_path / layer).mkdir()
    (tmp_path / layer / "module.py").write_text(code + "\n")
    assert violations(tmp_path) == []
