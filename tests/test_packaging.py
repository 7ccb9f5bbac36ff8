"""What pyproject.toml ships is what the tree holds."""

import fnmatch
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lockstep

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "docs", "build", "dist", "runs"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def package_folders(root: Path) -> set[Path]:
    """Folders that hold Python files, relative to root; hidden ones and those that are not shipped left out."""
    tops = (top for top in root.iterdir() if top.is_dir() and top.name not in NOT_SHIPPED and top.name[0] != ".")
    return {path.parent.relative_to(root) for top in tops for path in top.rglob("*.py")}


def package_name(folder: Path) -> str:
    """lockstep/ is the package `lockstep` itself; the other folders stand below it."""
    return "lockstep" if folder == Path("lockstep") else ".".join(("lockstep", *folder.parts))


def test_every_folder_with_python_is_a_package():
    expected = {package_name(folder) for folder in package_folders(ROOT)}
    assert sorted(SETUPTOOLS["packages"]) == sorted(expected)


def test_every_package_has_its_init_file():
    assert [folder for folder in package_folders(ROOT) if not (ROOT / folder / "__init__.py").exists()] == []


def test_package_dir_maps_every_top_level_folder():
    tops = {folder.parts[0] for folder in package_folders(ROOT)}
    assert SETUPTOOLS["package-dir"] == {package_name(Path(top)): top for top in tops}


@pytest.mark.parametrize("top", sorted({folder.parts[0] for folder in package_folders(ROOT)}))
def test_other_files_in_packages_are_package_data(top):
    data = SETUPTOOLS["package-data"]
    patterns = data["*"] + data.get(package_name(Path(top)), [])
    files = [path for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    others = [path.relative_to(ROOT / top) for path in files if path.suffix != ".py"]
    # "**/" in setuptools means any number of folders, none included; without a folder it is the top one.
    shipped = [
        path
        for path in others
        if any(fnmatch.fnmatch(f"./{path}", f"./{pattern}".replace("./**/", "**/")) for pattern in patterns)
    ]
    assert others == shipped


def test_the_tree_is_compared(tmp_path):
    (tmp_path / "engine" / "models").mkdir(parents=True)
    (tmp_path / "engine" / "models" / "new.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_new.py").touch()
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / "new.py").touch()
    assert package_folders(tmp_path) == {Path("engine/models")}


def test_the_version_stands_once_and_is_the_installed_ones():
    assert re.fullmatch(r"\d+\.\d+\.\d+", lockstep.__version__)
    assert "version" not in PYPROJECT["project"]
    assert importlib.metadata.version("lockstep-rl") == lockstep.__version__
    assert f"## {lockstep.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_is_there_from_any_folder(tmp_path):
    """Not only at the root of the repository, where the folder itself is found."""
    program = "import lockstep, lockstep.configs; print(lockstep.__version__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (lockstep.__version__, "")


@pytest.mark.parametrize("top", sorted({folder.parts[0] for folder in package_folders(ROOT)}))
def test_every_package_says_that_it_is_typed(top):
    assert (ROOT / top / "py.typed").is_file()


def test_the_metadata_is_whole_and_names_no_address_that_is_not_there():
    project = PYPROJECT["project"]
    for key in ("description", "readme", "requires-python", "license", "authors", "keywords", "classifiers"):
        assert project[key], key
    assert "urls" not in project or all(url.startswith("https://") for url in project["urls"].values())
    assert "License ::" not in " ".join(project["classifiers"])  # PEP 639: the expression is the licence
    for version in re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"])):
        assert tuple(map(int, version.split("."))) >= (3, 11)


def test_make_never_silences_pip():
    """A download takes minutes: pip says what it does, since no `-q` keeps it from that."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    pip_lines = [line for line in lines if "pip install" in line or "pip wheel" in line]
    assert len(pip_lines) >= 5
    assert [line for line in pip_lines if re.search(r"\s(-q+|--quiet)\b", line)] == []


def needed_packages(requirements: list[str]) -> set[str]:
    """Names of what these need here, and of what that needs in turn. What is not installed needs nothing."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in {(canonicalize_name(requirement.name), name) for name in ("", *requirement.extras)} - found:
            found.add(wanted)
            try:
                texts = importlib.metadata.requires(requirement.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [(Requirement(text), wanted[1]) for text in texts]
    return {name for name, _ in found}


def test_every_pin_is_of_a_package_that_is_needed():
    project = PYPROJECT["project"]
    requirements = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    needed = needed_packages(requirements)
    assert sorted(pinned - needed) == []
    assert {canonicalize_name(Requirement(text).name) for text in requirements} <= pinned


def test_at_the_root_of_a_clone_the_packages_are_its_own(tmp_path):
    """Also where the package is installed from a wheel, which the folder `lockstep` there stands before."""
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in getattr(f, '__name__', '')]\n"
        "import lockstep.configs, lockstep.recipes.user_errors as m; print(m.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (str(ROOT / "recipes" / "user_errors.py"), "")
