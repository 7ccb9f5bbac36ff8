"""Sinks and the live view: every record arrives; optional packages are asked for by name."""

import dataclasses
import io
import itertools
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lockstep.recipes.runs import live, sinks
from lockstep.recipes.runs.config import WandbConfig
from lockstep.recipes.runs.live import LiveView, sparkline
from lockstep.recipes.runs.metrics import METRICS
from lockstep.recipes.runs.run_directory import RunDirectory, read_metrics
from lockstep.recipes.runs.sinks import open_sinks


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run", {"steps": 2}) as run:
        yield run


class Recording:
    def __init__(self) -> None:
        self.records: list[tuple] = []
        self.samples: list[tuple] = []
        self.closed = 0

    def record(self, step, stage, metrics) -> None:
        self.records.append((step, stage, dict(metrics)))

    def record_samples(self, step, stage, rows) -> None:
        self.samples.append((step, stage, list(rows)))

    def close(self) -> None:
        self.closed += 1


def test_records_go_to_metrics_jsonl_and_to_every_other_sink(run):
    other = Recording()
    with open_sinks((), run, {}, other) as opened:
        opened.record(1, "rl", {"reward": 0.5})
        opened.record(1, "eval", {"accuracy": 0.25})
    assert other.records == [(1, "rl", {"reward": 0.5}), (1, "eval", {"accuracy": 0.25})]
    assert other.closed == 1
    assert read_metrics(run.path) == [
        {"step": 1, "stage": "rl", "reward": 0.5},
        {"step": 1, "stage": "eval", "accuracy": 0.25},
    ]


def test_an_unknown_sink_is_named(run):
    with pytest.raises(ValueError, match="unknown sink 'wandbb'; there are: wandb, tensorboard"):
        open_sinks(("wandbb",), run, {})


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_sink_that_is_not_installed_names_the_extra(run, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"lockstep-rl\[sinks\]"):
        open_sinks((name,), run, {})


def test_wandb_runs_offline_inside_the_run_directory(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sinks.launch, "_reachable", lambda url: False)
    with open_sinks(("wandb",), run, {"steps": 2}) as opened:
        opened.record(1, "rl", {"reward": 0.5})
        opened.record(1, "eval", {"accuracy": 0.5})
        opened.record_samples(1, "eval", [{"data set": "a", "prompt": "p", "response": "r", "reward": 1.0}])
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))


@dataclasses.dataclass(frozen=True)
class Config:
    wandb: WandbConfig = WandbConfig()  # noqa: RUF009  frozen


class FakeWandb:
    """Stands in for the package: what it was asked for, after the checks of names that the real one makes."""

    def __init__(self, monkeypatch):
        self.started, self.logged = [], []
        self.real = pytest.importorskip("wandb")
        monkeypatch.setattr(self.real, "init", self.init)

    def init(self, **options):
        self.real.Settings(run_id=options["id"], project=options["project"], entity=options["entity"])
        self.started.append(options)
        return self

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        pass


def test_wandbs_names_are_options_are_cleaned_and_ids_are_unique_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.launch, "_reachable", lambda url: False)
    fake = FakeWandb(monkeypatch)
    odd = WandbConfig(project="my/project?" + "x" * 200, entity="team#1", group="a:b", name=" ", id="run/1")
    for folder, config in (("a b:c", Config()), ("a b:c", Config()), ("d/a b:c", Config()), ("e", Config(odd))):
        with RunDirectory(tmp_path / folder, {}) as run, open_sinks(("wandb",), run, config):
            pass
    first, resumed, other, named = fake.started
    assert first["id"] == resumed["id"] != other["id"]
    assert [start["resume"] for start in fake.started] == ["allow"] * 4
    assert (first["name"], first["project"], first["entity"], first["group"]) == ("a b-c", "lockstep", None, None)
    assert (named["name"], named["id"], named["entity"], named["group"]) == ("run", "run-1", "team-1", "a-b")
    assert len(named["project"]) == 128
    assert named["project"].startswith("my-project-xxx")


@settings(deadline=None)
@given(st.text(min_size=1, max_size=200))
def test_every_name_becomes_one_that_wandb_takes(name):
    wandb = pytest.importorskip("wandb")
    clean = sinks.accepted_name(name, "instead")
    wandb.Settings(run_id=clean, project=clean, entity=clean, run_name=clean, run_group=clean)
    assert sinks.accepted_name(clean, "instead") == clean


def test_wandb_gets_a_table_of_samples_of_each_data_set(run, monkeypatch):
    monkeypatch.setattr(sinks.launch, "_reachable", lambda url: False)
    fake = FakeWandb(monkeypatch)
    rows = [
        {"data set": name, "prompt": f"p{n}", "response": "r", "reward": 0.5, "reference": str(n)}
        for name in ("sums", "gcd")
        for n in range(5)
    ]
    with open_sinks(("wandb",), run, Config(WandbConfig(sample_rows=2))) as opened:
        opened.record_samples(4, "eval", rows)
        opened.record_samples(8, "eval", [])
    (logged,) = fake.logged
    table = logged["eval/samples"]
    assert (logged["step"], table.columns) == (4, ["step", "data set", "prompt", "response", "reward", "reference"])
    assert [(row[1], row[2]) for row in table.data] == [("sums", "p0"), ("sums", "p1"), ("gcd", "p0"), ("gcd", "p1")]


def test_tensorboard_writes_every_value(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(("tensorboard",), run, {}) as opened:
        opened.record(1, "rl", {"reward": 0.5, "note": "text"})
        opened.record(2, "rl", {"reward": 0.75})
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("rl/reward")] == [(1, 0.5), (2, 0.75)]


def view_of(is_terminal: bool, console_width: int = 100) -> tuple[LiveView, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=console_width, color_system=None)
    return LiveView("rl", total_steps=2, console=console), output


def test_without_a_terminal_a_record_is_a_line():
    view, output = view_of(is_terminal=False, console_width=20)
    with view:
        view.record(1, "rl", {"time/train": 0.25, "reward": 0.5, "logprob_diff_max": 0.0, "novel_metric": 3})
        view.record(1, "eval", {"accuracy": 0.125})
        view.summary({"accuracy": "12.5%"})
    lines = output.getvalue().splitlines()
    assert lines[0] == "rl 1/2  reward 0.500  logprob_diff_max 0 (exact)  novel_metric 3  time/train 0.25 s"
    assert lines[1:3] == ["eval 1/2  accuracy 12.5%", "rl accuracy: 12.5%"]
    assert "\x1b" not in output.getvalue()


def test_without_a_terminal_lines_are_few_and_short_and_the_first_and_last_are_there(monkeypatch):
    clock = itertools.count(step=0.1)
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    metrics = dict.fromkeys(METRICS, 0.123456789) | {f"time/part_{number}": 1.0 for number in range(30)}
    with LiveView("rl", total_steps=400, console=Console(file=output)) as view:
        for step in range(1, 401):
            view.record(step, "rl", metrics)
            if step % 5 == 0:
                view.record(step, "eval", {"accuracy": step / 400})
    lines = output.getvalue().splitlines()
    heads = [" ".join(line.split()[:2]) for line in lines]
    assert max(map(len, lines)) <= 160
    assert heads[0] == "rl 1/400"
    assert heads[-2:] == ["rl 400/400", "eval 400/400"]
    assert len(lines) < next(clock) / live.LINE_EVERY_S + 5  # the first and the last of two stages beside
    assert 3 <= sum(head.startswith("eval") for head in heads) <= len(lines) - 3  # both stages have their turns


def test_in_a_terminal_the_table_shows_the_latest_values():
    view, output = view_of(is_terminal=True)
    with view:
        view.record(1, "rl", {"reward": 0.25, "tokens_per_s": 1234.5})
        view.record(2, "rl", {"reward": 0.5, "tokens_per_s": math.nan})
        view.record(2, "eval", {"accuracy": 0.75})
    last_frame = output.getvalue().rpartition("2/2")[2]
    for shown in ("reward", "0.500", "▁█", "tokens/s", "nan", "eval: held-out accuracy", "75.0%"):
        assert shown in last_frame


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0], "▁"), ([0.0, 1.0, 0.5], "▁█▅"), ([9.0, 0.0, math.nan, 1.0], "▁ █"), ([math.inf], " ")],
)
def test_sparkline(values, expected):
    assert sparkline(values, 3) == expected
