"""The order inside the packages: folders import downwards, no modules import in a circle, and nothing is too large."""

import ast
from collections import defaultdict

import pytest
from code_map import ROOT, circles, complexity, imports_of, modules

# The folders of each package from the lowest floor up: each may import those before it. Modules that lie in the package
# itself, and every `config`, may be imported from any floor; of them it is asked only that nothing is a circle.
FLOORS = {
    "kernels": ("memory", "linear", "reductions", "norm_rope", "attention", "latent", "moe", "sampling"),
    "engine": (
        "fields", "memory", "scheduling", "models", "checkpoints", "text", "weights", "speculation", "steps", "ranks",
    ),
    "rollout": ("mathematics", "tasks", "rewards", "environments"),
    "trainer_bridge": ("algorithms", "megatron", "drafts", "transports"),
    "recipes": ("runs", "cluster", "conversion", "planning", "drafts", "evaluation", "rl", "bench"),
}  # fmt: skip
# Folders that still import a floor above theirs. An entry that is no longer needed fails the test too.
UPWARDS = {
    ("engine", "models", "ranks"),  # a layer sums over the rank group that it is given
    ("rollout", "tasks", "rewards"),  # reasoning-gym's verifiers run isolated
}

MAX_LINES = 400  # of a file
MAX_FUNCTION_LINES = 60
MAX_COMPLEXITY = 15
# Outside kernels/, what is larger than that today. The lists shrink: an entry that is no longer needed fails.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
COMPLEX_FUNCTIONS = {
    "lockstep.engine.fields.field_types._checked",
}


def edges() -> dict[str, set[str]]:
    known = set(modules())
    return {name: set(imports_of(tree, known)) - {name, "lockstep"} for name, tree in modules().items()}


def folder_of(module: str) -> tuple[str, str]:
    """(package, folder within it); the folder is "" for what lies in the package itself."""
    _, package, *rest = [*module.split("."), "", ""][: module.count(".") + 3]
    in_folder = rest[0] in FLOORS.get(package, ())
    return package, rest[0] if in_folder and not module.endswith(".config") else ""


def test_no_modules_import_in_a_circle():
    assert circles(edges()) == []


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"a", "e"}, "e": set(), "f": {"e"}}
    assert circles(graph) == [["a", "b", "c", "d"]]
    known = {"lockstep.x", "lockstep.x.y", "lockstep.z"}
    code = "if TYPE_CHECKING:\n    from lockstep.z import Z\ndef f():\n    from lockstep.x import y, other"
    assert set(imports_of(ast.parse(code), known)) == known


def test_every_folder_has_its_floor():
    for package, floors in FLOORS.items():
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert folders == set(floors), package


def test_folders_import_downwards():
    upwards = set()
    for module, imported in edges().items():
        package, folder = folder_of(module)
        for other in imported:
            of, above = folder_of(other)
            if of == package and folder and above and FLOORS[package].index(above) > FLOORS[package].index(folder):
                upwards.add((package, folder, above))
    assert upwards == UPWARDS


def test_public_class_names_are_unique():
    homes = defaultdict(list)
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """(module.name, function) of all outside kernels/, methods included."""
    return [
        (f"{module}.{node.name}", node)
        for module, tree in modules().items()
        if not module.startswith("lockstep.kernels")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_files_are_short():
    long = set()
    for package in FLOORS.keys() - {"kernels"}:
        for path in (ROOT / package).rglob("*.py"):
            if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES:
                long.add("lockstep." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert long == LONG_FILES


def test_functions_are_short():
    long = {name for name, node in functions() if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES}
    assert long == LONG_FUNCTIONS


def test_functions_are_simple():
    assert {name for name, node in functions() if complexity(node) > MAX_COMPLEXITY} == COMPLEX_FUNCTIONS


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(): return 1", 1),
        ("def f(a, b): return a and b or a", 3),
        ("def f(x):\n    for i in x:\n        if i: pass\n        elif x: pass", 4),
        ("def f(x):\n    try: pass\n    except A: pass\n    return [i for i in x if i if not i]", 5),
        ("def f(x):\n    def g(): return 1 if x else 2\n    return g", 2),
    ],
)
def test_complexity_counts_decisions(code, expected):
    assert complexity(ast.parse(code).body[0]) == expected
