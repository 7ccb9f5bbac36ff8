"""SHA-256 beside what a run writes, in the format of `sha256sum`, so that later changes are detected and named."""

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".sha256"
PACKED = ".gz"  # what gzip adds to the name of a file that it takes the place of
FOLDER_LIST = "SHA256SUMS"


def hash_line(content: bytes, name: str) -> str:
    """What a hash file says of a file of this name and content."""
    return _line(hashlib.sha256(content).hexdigest(), name)


def check_file(path: Path) -> None:
    """Raises ValueError that names the file unless its content is that of the hash file beside it.

    Either may have been packed by gzip since.
    """
    with opened(path.with_suffix(SUFFIX)) as file:
        recorded = file.read().decode("utf-8", "replace")
    with opened(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if recorded != _line(digest, path.name):
        name = path.with_suffix(SUFFIX).name
        raise ValueError(f"{path} was changed after it was written: it does not have the hash in {name}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, or, where gzip has packed it, what it was. Raises ValueError that names a missing or damaged one."""
    packed = path.with_name(path.name + PACKED)
    if not path.exists() and not packed.exists():
        others = sorted(other.name for other in path.parent.glob(f"{path.name}.*"))
        raise ValueError(f"{path} is missing" + (f"; beside it is {others[0]}: unpack that" if others else ""))
    with open(path, "rb") if path.exists() else gzip.open(packed) as file:
        try:
            yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{packed} is damaged: {error}") from error


def write_folder_list(folder: Path) -> None:
    """Lists the hashes of all files below the folder, in the folder."""
    lines = [_line(digest, name) for name, digest in _hashes(folder).items()]
    (folder / FOLDER_LIST).write_text("".join(lines), encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raises ValueError that names a file below the folder which is not as it was listed."""
    recorded = folder / FOLDER_LIST
    if not recorded.exists():
        raise ValueError(f"{recorded} is missing")
    lines = recorded.read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = _hashes(folder)
    for name in sorted(listed.keys() | present.keys()):
        if listed.get(name) != present.get(name):
            what = "is missing" if name not in present else "was added" if name not in listed else "was changed"
            raise ValueError(f"{folder / name} {what} after {FOLDER_LIST} was written")


def _hashes(folder: Path) -> dict[str, str]:
    """By path below the folder; of the list itself none."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / FOLDER_LIST)
    return {file.relative_to(folder).as_posix(): hash_of(file) for file in files}


def hash_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(digest: str, name: str) -> str:
    return f"{digest}  {name}\n"
