"""Models and data sets of the Hugging Face hub, by id: through its own library, cache, settings and proxies.

    org/name, org/name@revision                          a model, where a model directory is expected
    hf://datasets/org/name@revision/path/*.parquet       data files

A revision is a branch, a tag or a commit. `pinned` gives the same with the commit, which is what a run keeps: it
resumes with the same files, also without a network.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

DATA_PREFIX = "hf://"
# What a run reads of a model's repository: no weights in other formats, no images.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
TOKENIZER_AND_CONFIG = ("*.json", "*.jinja", "*.model", "*.txt")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_MODEL = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^@\s]+))?")
_DATA = re.compile(rf"hf://datasets/(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^@/\s]+))?/(?P<path>[^@\s]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """repo: org/name. revision: None is the main branch. path: of data files, perhaps a pattern; None for a model."""

    repo: str
    revision: str | None
    path: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision is not None else ""
        return f"{self.repo}{at}" if self.path is None else f"{DATA_PREFIX}datasets/{self.repo}{at}/{self.path}"

    @property
    def is_pinned(self) -> bool:
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def parse(name: str) -> HubId | None:
    """The hub id that a model path or a data file is; None where it is a local path.

    A directory that exists is local, whatever its name. Raises ValueError for an hf:// address that names no data file.
    """
    if name.startswith(DATA_PREFIX):
        found = _DATA.fullmatch(name)
        if found is None:
            raise ValueError(f"{name} names no data file: it must be hf://datasets/ORG/NAME[@REVISION]/PATH")
        return HubId(found["repo"], found["revision"] and found["revision"].replace("%2F", "/"), found["path"])
    found = _MODEL.fullmatch(name)
    if found is None or Path(name).exists() or Path(name.partition("/")[0]).is_dir():
        return None
    return HubId(found["repo"], found["revision"])


def model_directory(name: str, files: Sequence[str] = MODEL_FILES) -> str:
    """The local directory of a model: the name itself, or the snapshot of a hub id, downloaded where it is not cached.

    Raises ValueError, one line, for an id that is neither in the cache nor on the hub.
    """
    found = parse(name)
    return name if found is None else str(_snapshot(found, files))


def data_files(name: str) -> list[str]:
    """The local files of a data file's name: itself, or those of an hf:// address, in the order of their names."""
    found = parse(name) if name.startswith(DATA_PREFIX) else None
    if found is None:
        return [name]
    folder = _snapshot(found, [found.path])
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = [str(folder / name) for name in names if name == found.path or fnmatch.fnmatchcase(name, found.path)]
    if not files:
        raise ValueError(f"the data set {found.repo} (commit {folder.name}) has no file {found.path}")
    return files


def pinned(name: str, files: Sequence[str] = TOKENIZER_AND_CONFIG) -> str:
    """The name with the commit that it means now; a local path, or a name with a commit, as it is."""
    found = parse(name)
    if found is None or found.is_pinned:
        return name
    folder = _snapshot(found, files if found.path is None else [found.path])
    return str(replace(found, revision=folder.name))


def means(stored: str, given: str) -> bool:
    """Whether `stored`, which a run has pinned, can be what `given` meant then. A revision of its own is looked up."""
    if stored == given:
        return True
    if not given.startswith(DATA_PREFIX) and _MODEL.fullmatch(given) is None:
        return False
    one, other = parse(stored), parse(given)
    return one is not None and other is not None and replace(one, revision=None) == other


def check_repo(name: str, key: str) -> None:
    """Raises ValueError unless it can be a repository of the hub."""
    if _MODEL.fullmatch(name) is None or "@" in name:
        raise ValueError(f"{key}={name} is no repository of the hub: it must be ORG/NAME")


def _snapshot(hub_id: HubId, files: Sequence[str]) -> Path:
    """The folder of the commit, called by its name."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind = "model" if hub_id.path is None else "dataset"

    def download(is_cached: bool) -> Path:
        return Path(
            snapshot_download(
                hub_id.repo,
                repo_type=kind,
                revision=hub_id.revision,
                allow_patterns=list(files),
                local_files_only=is_cached,
            )
        )

    try:
        if hub_id.is_pinned:  # a commit does not change: what is cached needs no network
            try:
                return download(is_cached=True)
            except LocalEntryNotFoundError:
                pass
        return download(is_cached=False)
    except (HfHubHTTPError, HFValidationError, OSError, httpx.HTTPError) as error:
        raise ValueError(_why_not(hub_id, kind, error)) from error


def _why_not(hub_id: HubId, kind: str, error: Exception) -> str:
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"the {kind} {hub_id.repo}" + (f" at {hub_id.revision}" if hub_id.revision else "")
    if isinstance(error, GatedRepoError):
        return (
            f"{what} is gated: accept its terms at {constants.ENDPOINT}/{hub_id.repo}, and log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: the hub has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return f"{what} is neither a local directory nor on the hub (a private one needs `hf auth login`)"
    where = f"the cache {constants.HF_HUB_CACHE}"
    # The library's error of what is not cached is a FileNotFoundError.
    if isinstance(error, FileNotFoundError | ConnectionError | httpx.TransportError):
        return f"{what} is neither a local directory nor in {where}, and the hub cannot be reached"
    return f"{what} cannot be had from the hub: {' '.join(str(error).split())[:200]}"
