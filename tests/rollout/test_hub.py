"""Models and data sets of the hub, from a cache that is laid out as the library lays it out, without a network."""

import json

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lockstep.rollout import hub
from lockstep.rollout.tasks import LocalFilesConfig, build_task

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; what is not in it cannot be had."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def lay_out(cache, repo, files, commit=COMMIT, ref="main", kind="models"):
    """As the library does: contents as blobs, commits as folders of links to them, branches as files with a commit."""
    home = cache / f"{kind}--{repo.replace('/', '--')}"
    for number, (name, content) in enumerate(files.items()):
        blob, link = home / "blobs" / f"{commit[:4]}{number}", home / "snapshots" / commit / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        link.symlink_to(blob)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    return home / "snapshots" / commit


def test_a_model_in_the_cache(cache):
    snapshot = lay_out(cache, "org/Name-0.5B", {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"})
    older = lay_out(cache, "org/Name-0.5B", {"config.json": "{}"}, OLDER, "v1")
    assert hub.model_directory("org/Name-0.5B") == str(snapshot)
    assert hub.model_directory("org/Name-0.5B@v1") == str(older)
    assert hub.model_directory(f"org/Name-0.5B@{OLDER}") == str(older)
    assert hub.pinned("org/Name-0.5B") == f"org/Name-0.5B@{COMMIT}"
    assert hub.pinned("org/Name-0.5B@v1") == f"org/Name-0.5B@{OLDER}"
    assert hub.pinned(f"org/Name-0.5B@{OLDER}") == f"org/Name-0.5B@{OLDER}"


def test_what_is_here_is_no_hub_id(cache, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in ("org/name", "org/absent", "/models/x", "./org/name", "~/x", "runs/a/model", "name", "a b/c"):
        assert hub.model_directory(name) == name == hub.pinned(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@v2", f"nobody/nothing@{COMMIT}"])
def test_a_model_that_is_not_cached_is_one_line(cache, name):
    with pytest.raises(
        ValueError, match=r"the model nobody/nothing.*neither a local directory nor in the cache"
    ) as error:
        hub.model_directory(name)
    assert str(cache) in str(error.value)
    assert "\n" not in str(error.value)


def test_data_files_of_a_data_set(cache):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(40)]
    files = {f"data/train-{n}.jsonl": json.dumps(row) for n, row in enumerate(rows)} | {
        "README.md": "",
        "test.jsonl": "",
    }
    snapshot = lay_out(cache, "org/sums", files, kind="datasets")
    assert hub.data_files("hf://datasets/org/sums/data/train-2.jsonl") == [str(snapshot / "data/train-2.jsonl")]
    pattern = "hf://datasets/org/sums@main/data/*.jsonl"
    assert hub.data_files(pattern) == [str(snapshot / f"data/train-{n}.jsonl") for n in sorted(range(40), key=str)]
    assert hub.pinned(pattern) == f"hf://datasets/org/sums@{COMMIT}/data/*.jsonl"
    train = build_task(LocalFilesConfig([pattern], held_out_fraction=0.5)).train
    assert train.problem(0).problem_id.startswith("train-")
    with pytest.raises(ValueError, match=r"org/sums \(commit aaaa.*has no file data/\*\.parquet"):
        hub.data_files("hf://datasets/org/sums/data/*.parquet")
    with pytest.raises(ValueError, match=r"the dataset org/absent.*the hub cannot be reached"):
        build_task(LocalFilesConfig(["hf://datasets/org/absent/x.jsonl"]))


@pytest.mark.parametrize(
    "name", ["hf://org/name", "hf://datasets/org/name", "hf://datasets/name/", "hf://models/a/b/c"]
)
def test_addresses_without_a_file_are_named(name):
    with pytest.raises(ValueError, match="must be hf://datasets/ORG/NAME"):
        hub.data_files(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "neither a local directory nor on the hub"),
        (RevisionNotFoundError, "the hub has no such revision"),
        (GatedRepoError, "is gated: accept its terms at .*/org/name"),
        (OSError, "cannot be had from the hub: two lines"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, message):
    def refuse(*arguments, **options):
        raise error("two\nlines") if error is OSError else error("two\nlines", response=Response())

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=message) as refused:
        hub.model_directory("org/name@v1")
    assert "\n" not in str(refused.value)


class Response:
    headers: dict = {}  # noqa: RUF012
    request = None
    status_code = 404


@pytest.mark.parametrize(
    ("stored", "given", "is_so"),
    [
        (f"org/name@{COMMIT}", "org/name", True),
        (f"org/name@{COMMIT}", f"org/name@{COMMIT}", True),
        (f"org/name@{COMMIT}", "org/name@v1", False),
        (f"org/name@{COMMIT}", "org/other", False),
        ("runs/a/model", "runs/b/model", False),
        (f"hf://datasets/org/name@{COMMIT}/a.jsonl", "hf://datasets/org/name/a.jsonl", True),
        (f"hf://datasets/org/name@{COMMIT}/a.jsonl", "hf://datasets/org/name/b.jsonl", False),
        ("a.jsonl", "hf://datasets/org/name/b.jsonl", False),
    ],
)
def test_a_stored_commit_is_what_was_given(stored, given, is_so):
    assert hub.means(stored, given) is is_so


@pytest.mark.parametrize("name", ["name", "org/name@v1", "org/na me", "/org/name", "hf://org/name"])
def test_what_is_no_repository_is_named(name):
    with pytest.raises(ValueError, match=r"push_to_hub=.*must be ORG/NAME"):
        hub.check_repo(name, "push_to_hub")
