"""docs/security.md: each paragraph, bullet and row of it names tests that are there, or says that it is no promise."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/security.md").read_text()
# Its lists are compared with the code, call by call, by the test that the section names.
TABLES_OF_CALLS = re.compile(r"(?ms)^## System calls\n.*?(?=^## )")
REFERENCE = re.compile(r"\b([A-Z]) ((?:`[^`]+`(?:,\s+)?)+)")
NO_PROMISE = "(no promise)"


def letters() -> dict[str, str]:
    """Of the page's first table: the letter of each file of tests."""
    return dict(re.findall(r"(?m)^\| ([A-Z]) \| `([^`]+)` \|$", PAGE))


def blocks() -> list[str]:
    """Paragraphs, bullets and rows of tables, without titles, examples, the table of letters and those of calls."""
    text = re.sub(r"(?ms)^```.*?^```$", "", TABLES_OF_CALLS.sub("", PAGE))
    found = []
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith("|"):
            found += block.strip().splitlines()[2:]
        elif not block.lstrip().startswith("#") or "\n" in block.strip():
            lines = "\n".join(line for line in block.splitlines() if not line.startswith("#"))
            found += re.split(r"(?m)^(?=- |\d\. )", lines)
    return [" ".join(block.split()) for block in found if block.strip() and not re.match(r"\| [A-Z] \| `", block)]


def references(text: str) -> list[tuple[str, str]]:
    return [(letter, name) for letter, names in REFERENCE.findall(text) for name in re.findall(r"`([^`]+)`", names)]


@cache
def functions(file: str) -> tuple[str, ...]:
    """Names of the tests in a file, and the file's text."""
    source = (ROOT / file).read_text()
    found = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return tuple(name for name in found if name.startswith("test_")), source


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block[:40])
def test_each_part_names_its_tests_or_promises_nothing(block):
    assert references(block) or NO_PROMISE in block


def test_all_references_lead_to_tests():
    found = references(" ".join(PAGE.split()))
    assert len(found) > 60
    for letter, reference in found:
        assert letter in letters(), f"{letter} `{reference}`"
        name, _, case = reference.partition("[")
        names, source = functions(letters()[letter])
        assert any(name in test for test in names), f"{letter} `{reference}`: no such test in {letters()[letter]}"
        assert case.rstrip("]").removesuffix(" ...") in source, f"{letter} `{reference}`: no such case"
    assert set(letters()) == {letter for letter, _ in found}, "a file that no sentence names"


def test_a_part_without_a_test_would_be_found():
    assert references("It is safe. (R `what_reaches_others`, `other_interfaces`)") == [
        ("R", "what_reaches_others"),
        ("R", "other_interfaces"),
    ]
    assert references("It is `safe`.") == []
