"""The report: self-contained, escaped, and with the run's results in it."""

import html.parser
import math
import re

import pytest

from lockstep.recipes.runs.report import write_report
from lockstep.recipes.runs.report_cards import summary_cards
from lockstep.recipes.runs.run_directory import RunDirectory

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta"}


class Structure(html.parser.HTMLParser):
    """Checks that tags nest, and collects what tests ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.hints: list[str] = []
        self.text: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "title":
                self.hints.append(value)
            if name in ("src", "href", "xlink:href"):
                self.sources.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def sample(step: int, index: int) -> dict:
    return {
        "problem_id": "add-1",
        "step": step,
        "prompt_index": 0,
        "sample_index": index,
        "seed": 7,
        "prompt_ids": [1, 2],
        "response_ids": [3, 4],
        "logprobs": [-0.5, -2.0],
        "weight_versions": [step, step],
        "finish_reason": "stop",
        "text": EVIL,
        "reward": float(index),
        "reference": f"{EVIL} 42",
        "advantage": index - 1.5,
    }


@pytest.fixture
def run_dir(tmp_path):
    with RunDirectory(tmp_path / "demo", {"model": EVIL, "steps": 3}) as run:
        run.record_metrics(0, "eval", {"accuracy": 0.125})
        for step in range(1, 6):
            trainer = {"time/wait_for_rollouts": 0.5, "time/train": 0.25}
            times = {**trainer, "time/rollout": 0.5, "time/wait_for_trainer": 0.25}
            run.record_metrics(
                step, "rl", {"reward": step / 5, "logprob_diff_max": 0.0, "tokens_per_s": 1000.0, **times}
            )
            run.write_rollouts(step, [sample(step, index) for index in reversed(range(4))])
        run.record_metrics(5, "eval", {"accuracy": 0.75})
        run.write_weights_hash("cafe" * 16)
    with RunDirectory(tmp_path / "warm", {}) as run:
        run.record_metrics(1, "sft", {"loss": 2.0})
        run.record_metrics(2, "sft", {"loss": math.nan})
    return run.path.parent / "demo"


def parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    return structure


def test_the_page_is_whole_and_asks_for_nothing_outside(run_dir):
    page = write_report(run_dir, earlier_runs=[run_dir.parent / "warm"]).read_text()
    structure = parse(page)
    assert all(source.startswith("#") for source in structure.sources)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "script" not in structure.tags
    text = " ".join(structure.text)
    for shown in (
        "12.5% → 75.0%",
        "cafe" * 16,
        "agree to the bit",
        "loss · sft",
        "reward · rl",
        "seconds per step",
        "steps: 3",
    ):
        assert shown in re.sub(r"\s+", " ", text)
    assert structure.tags.count("svg") == 5  # reward, accuracy, loss, log-prob difference, time


def test_samples_are_of_the_first_middle_and_last_step_in_order(run_dir):
    page = write_report(run_dir, samples_per_step=2).read_text()
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Step 1", "Step 3", "Step 5"]
    assert re.findall(r"reward (\d)</span>", page) == ["0", "1"] * 3
    hint = parse(page).hints[1]
    assert hint == "token 1: id 4\nlog-prob -2.000000 (p = 13.53%)\nweight version 1"
    assert page.count("--s:0.865") == 6


def test_texts_from_outside_are_escaped(run_dir):
    names = {1: "<b>", 2: "&amp;", 3: EVIL, 4: "\n"}
    page = write_report(run_dir, decode=lambda ids: "".join(names[i] for i in ids)).read_text()
    structure = parse(page)
    assert "script" not in structure.tags
    assert "b" not in structure.tags
    assert EVIL in structure.text  # the token, the response and the config read as they were written
    assert "<b>&amp;" in structure.text


def test_the_same_run_gives_the_same_page(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    with RunDirectory(tmp_path, {"steps": 3}):
        pass
    assert "no records yet" in " ".join(parse(write_report(tmp_path).read_text()).text)
    with pytest.raises(ValueError, match="not a run directory"):
        write_report(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("differences", "value", "good"),
    [([0.0, 0.0], "0", True), ([0.0, 2e-6], "2.0e-06", False), ([0.0, math.nan], "nan", False)],
)
def test_only_an_exact_zero_is_called_exact(differences, value, good):
    records = [{"step": i, "stage": "rl", "logprob_diff_max": difference} for i, difference in enumerate(differences)]
    card = summary_cards(records, None)[0]
    assert (card.value, card.good) == (value, good)


def test_what_the_policy_did_not_write_has_no_probability(tmp_path):
    episode = {**sample(1, 0), "response_ids": [3, 8, 9, 4], "logprobs": [-0.5, None, None, -2.0]}
    episode |= {"weight_versions": [1] * 4, "response_mask": [True, False, False, True], "turn_rewards": [0.25, 1.0]}
    with RunDirectory(tmp_path / "run", {"steps": 1}) as run:
        run.record_metrics(1, "rl", {"reward": 1.25})
        run.record_metrics(1, "eval", {"accuracy": 0.5, "pass@4": 0.75, "gcd/accuracy": 0.25})
        run.write_rollouts(1, [episode])
    page = write_report(tmp_path / "run").read_text()
    structure = parse(page)
    assert [hint.endswith("not written by the policy") for hint in structure.hints] == [False, True, True, False]
    assert page.count('class="given"') == 2
    text = " ".join(structure.text)
    for shown in (
        "rewards of the turns 0.25, 1",
        "log-prob -2.500",
        "held-out pass@4",
        "held-out accuracy, gcd",
        "25.0%",
    ):
        assert shown in text
    assert structure.tags.count("svg") == 4  # reward, and three of the evaluation


def test_a_sample_shows_its_reference_its_advantage_and_its_group(run_dir):
    page = write_report(run_dir, samples_per_step=4).read_text()
    text = re.sub(r"\s+", " ", " ".join(parse(page).text))
    assert text.count(f"reference answer {EVIL} 42") == 12
    assert text.count("group 0, sample 3 of 4; rewards of the group 0, 1, 2, 3 (mean 1.5)") == 3
    assert re.findall(r"advantage (\S+)", text)[:4] == ["-1.5", "-0.5", "+0.5", "+1.5"]


def test_older_rollouts_without_them_are_shown(tmp_path):
    with RunDirectory(tmp_path / "old", {}) as run:
        row = {name: value for name, value in sample(1, 0).items() if name not in ("reference", "advantage")}
        run.write_rollouts(1, [row])
    text = " ".join(parse(write_report(tmp_path / "old").read_text()).text)
    assert "advantage" not in text
    assert "reference answer" not in text


def test_cards_tell_training_from_evaluation():
    records = [
        {"step": 0, "stage": "eval", "reward": 0.125, "accuracy": 0.5, "tokens_per_s": 1.0},
        {"step": 1, "stage": "rl", "reward": 1.0, "train_accuracy": 0.75, "logprob_diff_max": 0.0},
        {"step": 2, "stage": "rl", "reward": 3.0, "accuracy": 0.0, "logprob_diff_max": 0.0},
        {"step": 2, "stage": "eval", "reward": 0.25, "accuracy": 0.75},
    ]
    cards = {card.title: card.value for card in summary_cards(records, None)}
    assert cards["Held-out accuracy"] == "50.0% → 75.0%"
    assert cards["Held-out reward"] == "0.125 → 0.250"
    assert cards["Reward of the rollouts"] == "1.000 → 3.000"
    assert "Tokens/s" not in cards


def test_a_phone_shows_the_page_without_scrolling_sideways(run_dir):
    """Nothing in the style asks for more than a phone's 390 px; a table scrolls in its own box, and plots shrink."""
    page = write_report(run_dir).read_text()
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    wide = [
        rule
        for rule in re.findall(r"[^{}]+\{[^{}]*\}", style)
        if any(int(pixels) > 366 for pixels in re.findall(r"(?<![-\w])(?:min-)?width: (\d+)px", rule))
        or re.search(r"minmax\(\d+px", rule)
    ]
    assert wide == []
    assert ".table { overflow-x: auto; }" in style
    assert ".plot svg { width: 100%;" in style
    assert re.search(r'<div class="table"><table>', page)
    assert not re.search(r"<(table|div|pre|section)[^>]* width=", page)
