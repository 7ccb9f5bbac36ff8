"""Every tensor that is made says its dtype and its device: what the process has set as defaults is no part of a result.

Kernels write by address, so a buffer of another dtype than the one meant is not only other numbers but another size.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "engine", "trainer_bridge", "rollout", "recipes")
MAKERS = {
    *("arange", "as_tensor", "asarray", "bartlett_window", "empty", "empty_permuted", "empty_strided", "eye", "full"),
    *("linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros"),
}
NEEDED = ("dtype", "device")
# They take the process's defaults, or change them.
FORBIDDEN = {"Tensor", "FloatTensor", "get_default_dtype", "set_default_dtype", "set_default_device"}


def implicit_allocations(source: str) -> list[tuple[int, str]]:
    """(line, what is wrong) for each call that leaves the dtype or the device of a new tensor to the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id == "torch"):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if name in FORBIDDEN or (name == "Generator" and not node.args and "device" not in given):
            found.append((node.lineno, f"torch.{name}"))
        elif name in MAKERS and None not in given and (missing := [word for word in NEEDED if word not in given]):
            found.append((node.lineno, f"torch.{name} without {' and '.join(missing)}"))
    return found


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("torch.empty(3)", "torch.empty without dtype and device"),
        ("torch.full((2,), 1, device=d)", "torch.full without dtype"),
        ("torch.arange(3, dtype=torch.int64)", "torch.arange without device"),
        ("x = torch.Tensor([1.0])", "torch.Tensor"),
        ("torch.Generator().manual_seed(1)", "torch.Generator"),
        ("torch.zeros(3, **like)", None),
        ("torch.zeros(3, dtype=t, device=d)", None),
        ("torch.empty_like(x)", None),
        ("x.new_zeros(3)", None),
    ],
)
def test_what_is_found(source, wrong):
    assert [found for _, found in implicit_allocations(source)] == ([wrong] if wrong else [])


@pytest.mark.parametrize("package", PACKAGES)
def test_tensors_are_made_with_a_dtype_and_a_device(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, problem in implicit_allocations(path.read_text())
    ]
    assert not wrong, "\n" + "\n".join(wrong)
