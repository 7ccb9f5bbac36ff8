"""The docs' commands: each composes, runs of one folder do not meet, and those of the README run, made small."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest

from lockstep.recipes import cli, config_schema
from lockstep.recipes.drafts.config import DraftConfig
from lockstep.recipes.runs.config import TrainingRunConfig
from lockstep.recipes.runs.run_directory import MAY_DIFFER

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/recipes").glob("*.md"))]
STAGES = {name: dataclasses.replace(stage, run=f"{__name__}:{'keep'}") for name, stage in cli.STAGES.items()}
SMALL_MODEL = [
    f"model.shape.{size}" for size in ("num_layers=2", "hidden_size=32", "head_dim=16", "ffn_hidden_size=32")
]
SMALL_EVALUATION = ["evaluation.num_problems=4", "evaluation.max_tokens=8"]
# What makes a stage's commands small; later values win over those of the docs.
SMALL = {
    "rl": [
        *("steps=2", "checkpoint_every=1", "evaluate_every=2", "warmup.examples_per_step=4"),
        *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens=8"),
        *("draft.num_draft_tokens=2", "num_threads=1", *SMALL_MODEL, *SMALL_EVALUATION),
    ],
    "replay": ["step=2"],
    "draft": ["steps=1", "held_out=2", "sequences_per_step=2", "max_tokens=32", "trainer.num_steps=2"],
    "eval": SMALL_EVALUATION,
    "convert": ["checkpoint=runs/demo/checkpoints/step_000002/trainer", "output=hf"],
}

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# The code and its pages: nothing that a run or a build left here.
FOLDERS = ("docs", "engine", "kernels", "recipes", "rollout", "tests", "trainer_bridge", "configs")

composed: list = []


def keep(config) -> None:
    composed.append(config)


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language; "" and "sh" are commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every `lockstep ...` of a page, in blocks and within lines, in their order."""
    lines: list[str] = []
    pattern = r"^```(\w*)\n(.*?)^```|`(lockstep [^`]+)`"
    for language, block, inline in re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if language in ("", "sh"):
            lines += [*block.replace("\\\n", " ").splitlines(), inline.replace("\n", " ")]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("lockstep ")]
    return [line[1:] for line in words if line[1] in cli.STAGES and len(line) > 2]


def all_commands() -> list[tuple[str, list[str]]]:
    """(page, words), each once, in the order of the pages."""
    seen: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for words in commands(page):
            seen.setdefault(tuple(words), str(page.relative_to(ROOT)))
    return [(page, list(words)) for words, page in seen.items()]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    composed.clear()
    return tmp_path


def test_every_command_composes_and_no_two_runs_have_one_folder(capfd):
    """Those with a "..." are parts of commands, and those with a run to resume need one: their keys are known."""
    runs: dict[Path, tuple[str, dict]] = {}
    checked = all_commands()
    assert len(checked) > 40
    for page, words in checked:
        shown = f"{page}: lockstep {shlex.join(words)}"
        resumes = words[0] != "replay" and any(word.startswith("run=") for word in words)  # the folder of a run
        stage, *overrides = [word for word in words if word != "..." and not (resumes and word.startswith("run="))]
        if "--help" in words:
            continue
        part = ["--cfg", "job"] if resumes or any("..." in word for word in words) else []
        try:
            cli.main([stage, *overrides, *part], STAGES)
        except SystemExit as error:
            pytest.fail(f"{shown}\n{capfd.readouterr().err}") if error.code else None
        if part:
            continue
        config = composed[-1]
        if not isinstance(config, TrainingRunConfig | DraftConfig) or config.run is not None:
            continue
        if getattr(config, "dry_run", False):
            continue
        plain = config_schema.to_plain(config)
        plain = {key: value for key, value in plain.items() if key not in MAY_DIFFER}
        other, before = runs.setdefault(config.directory, (shown, plain))
        assert before == plain, f"{shown}\nwrites into the folder of\n{other}"


def test_every_key_within_the_text_is_one():
    """`trainer.row_parallel_splits=8` in a sentence is a key of some stage, or in a mapping."""
    known: set[str] = set()
    for stage in cli.STAGES.values():
        known |= set(config_schema.keys(cli._resolve(stage.config)))
    parts = {key.split(".", count)[-1] for key in known for count in range(key.count(".") + 1)}
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for quoted in re.findall(r"`([^`\n]+)`", text):
            for key in re.findall(r"(?:^|\s)([a-z_]+(?:\.[a-z_]+)+)=", quoted):
                assert key in parts, f"{page.name}: {key}"


def test_every_make_target_and_path_of_a_test_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= targets
        for path in re.findall(r"(?<![\w/])(tests/[\w/]+(?:\.py)?)", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


# Of users, of a run's folder, or of a test's.
OTHERS_FILES = re.compile(
    r"path/to/\w+\.py|my_\w+\.py|config\.yaml|(program|tests|file)\.py|[\w/]*[A-Z]{4,}[\w/]*\.\w+"
)
REPOSITORY = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))]
)


def named_files(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w./*{}<-])((?:[\w-]+/)*[\w-]+\.(?:py|md|toml|yaml|sh))(?![\w/*])", text))


def docstrings(source: str) -> str:
    """Those of a module, and its comments."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED))
    comments = (line.partition("#")[2] for line in source.splitlines())
    return "\n".join([*(ast.get_docstring(node) or "" for node in nodes), *comments])


def test_every_file_that_docs_and_docstrings_name_is_there():
    """By its path from the root, or the end of one ("drafts/draft_stage.py")."""
    endings = {"/".join(path.split("/")[start:]) for path in REPOSITORY for start in range(path.count("/") + 1)}
    checked = 0
    for path in REPOSITORY:
        if path.endswith(".md") or (path.endswith(".py") and not path.startswith("tests/")):
            text = (ROOT / path).read_text(encoding="utf-8")
            named = named_files(text if path.endswith(".md") else docstrings(text))
            named = {name for name in named if not OTHERS_FILES.fullmatch(name)}
            checked += len(named)
            assert named <= endings, f"{path}: {sorted(named - endings)}"
    assert checked > 200


def test_a_file_that_is_not_there_would_be_found():
    assert named_files("see `engine/runner.py` and kernels/*.py, NAME.py") == {"engine/runner.py", "NAME.py"}
    assert docstrings('"""See gone.py."""\nx = "not.py"  # as other.py').split() == [
        "See",
        "gone.py.",
        "as",
        "other.py",
    ]


def test_every_link_leads_to_a_file():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def small(words: list[str]) -> list[str]:
    warmup = ["warmup.steps=2"] if "recipe=demo" in words else []
    return [*words, *SMALL[words[0]], *warmup]


def test_the_readmes_flow_runs_from_top_to_bottom(folder, capfd):
    """All that needs neither a model of one's own nor a GPU nor Ray: the demo, then what is done with its run."""
    runs_here = ("recipe=demo", "run=runs/demo", "engine.model=runs/demo/model", "model=runs/demo/model")
    flow = [
        words
        for words in commands(ROOT / "README.md")
        if any(word in runs_here for word in words) and "cluster=ray" not in words and "..." not in words
    ]
    assert [words[0] for words in flow][:2] == ["rl", "rl"]
    assert {words[0] for words in flow} == {"rl", "replay", "draft", "eval", "convert"}
    for words in flow:
        cli.main(small(words))
    assert "differences: 0" in capfd.readouterr().out
    for made in ("runs/demo/report.html", "runs/demo_async/model", "runs/draft/draft", "hf/model.safetensors"):
        assert (folder / made).exists(), made


def test_a_task_and_an_algorithm_of_ones_own_as_the_page_has_them(folder):
    page = ROOT / "docs" / "your_own.md"
    for text in blocks(page, "python"):
        if name := re.match(r"# (my_\w+\.py)", text):
            (folder / name[1]).write_text(text)
    (words,) = [words for words in commands(page) if "name=doubling" in words]
    cli.main(small(words))
    assert (folder / "runs/doubling/model/model.safetensors").exists()
