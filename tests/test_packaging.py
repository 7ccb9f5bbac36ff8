"""What pyproject.toml ships is what the tree holds."""

import fnmatch
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "docs", "build", "dist", "runs"}
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def package_folders(root: Path) -> set[Path]:
    """Folders that hold Python files, relative to root; hidden ones and those that are not shipped left out."""
    tops = (top for top in root.iterdir() if top.is_dir() and top.name not in NOT_SHIPPED and top.name[0] != ".")
    return {path.parent.relative_to(root) for top in tops for path in top.rglob("*.py")}


def test_every_folder_with_python_is_a_package():
    expected = {"lockstep." + ".".join(folder.parts) for folder in package_folders(ROOT)}
    assert sorted(SETUPTOOLS["packages"]) == sorted(expected)


def test_every_package_has_its_init_file():
    assert [folder for folder in package_folders(ROOT) if not (ROOT / folder / "__init__.py").exists()] == []


def test_package_dir_maps_every_top_level_folder():
    tops = {folder.parts[0] for folder in package_folders(ROOT)}
    assert SETUPTOOLS["package-dir"] == {f"lockstep.{top}": top for top in tops}


@pytest.mark.parametrize("top", sorted({folder.parts[0] for folder in package_folders(ROOT)}))
def test_other_files_in_packages_are_package_data(top):
    patterns = SETUPTOOLS.get("package-data", {}).get(f"lockstep.{top}", [])
    files = [path for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    others = [path.relative_to(ROOT / top) for path in files if path.suffix != ".py"]
    # "**/" in setuptools means any number of folders, none included.
    shipped = [path for path in others if any(fnmatch.fnmatch(f"./{path}", pattern) for pattern in patterns)]
    assert others == shipped


def test_the_tree_is_compared(tmp_path):
    (tmp_path / "engine" / "models").mkdir(parents=True)
    (tmp_path / "engine" / "models" / "new.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_new.py").touch()
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / "new.py").touch()
    assert package_folders(tmp_path) == {Path("engine/models")}
