"""Steps that are packed and padded as for CUDA graphs give the bits of eager ones. Here a call stands for a replay."""

from dataclasses import replace

import pytest
import torch
from comparisons import output_differences
from drafts import make_draft
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import save_draft
from lockstep.engine.models.config import load_model_config
from lockstep.engine.steps import draft_steps, graph_steps
from lockstep.engine.steps.attention_parts import AttentionParts
from lockstep.engine.steps.eager_steps import EagerSteps
from lockstep.engine.steps.graph_steps import GraphSteps
from lockstep.engine.steps.packed_rows import RowPacker

SHARED = list(range(3, 43))
PROMPTS = [[*SHARED, 50, 51], [*SHARED, 60], [9, 8, 7, 9, 8], [*SHARED, 50, 52], [1, 2]]
PARAMS = [SamplingParams(max_tokens=14, temperature=t, seed=i) for i, t in enumerate((1.0, 0.0, 1.0, 0.7, 1.0))]


class CalledGraphs:
    """Runs the function that a graph would be made of. keys: those of the steps so far."""

    def __init__(self, forward):
        self.forward, self.keys = forward, []

    def forget(self):
        pass

    def run(self, key, inputs, blank):
        places = blank()
        for place, value in zip(places, inputs, strict=True):
            place[: len(value)].copy_(value)
        self.keys.append(key)
        return self.forward(key, *places)


class PartsOnHost(AttentionParts):
    """Attention on the CPU takes no plans, and no queries of requests without keys: padding reads one key here."""

    def __init__(self, page_table):
        super().__init__(page_table)

    def decodes(self, slots, positions, planned=True):
        part = super().decodes(slots, positions, planned)
        return replace(part, kv_lens=part.kv_lens.clamp(min=1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for family in ("qwen3", "deepseek_v3"):
        path, draft = str(tmp_path_factory.mktemp(family)), str(tmp_path_factory.mktemp("draft") / "draft")
        make_hf_model(path, family, seed=3)
        config = load_model_config(path)
        heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16} if family == "deepseek_v3" else {}
        save_draft(draft, make_draft(config, draft_vocab_size=60, seed=4, **heads))
        made[family] = path, draft
    return made


def make_engine(models, family, drafter):
    path, draft = models[family]
    drafts = {"draft_model": draft if drafter == "eagle" else drafter, "num_draft_tokens": 3, "draft_min_accepted": 0.0}
    return Engine(EngineConfig(model=path, max_model_len=96, max_running_requests=12, **(drafts if drafter else {})))


@pytest.mark.parametrize(
    ("family", "drafter"), [("qwen3", None), ("qwen3", "ngram"), ("qwen3", "eagle"), ("deepseek_v3", "eagle")]
)
def test_packed_steps_have_the_bits_of_eager_ones(models, family, drafter, monkeypatch):
    engine = make_engine(models, family, drafter)
    expected = engine.generate(PROMPTS, PARAMS)
    for module in (graph_steps, draft_steps):
        monkeypatch.setattr(module, "StepGraphs", CalledGraphs)
    engine = make_engine(models, family, drafter)
    runner = engine.runner
    parts = PartsOnHost(runner.page_table)
    packer = RowPacker(runner.page_table.page_size, drafter == "eagle", torch.device("cpu"))
    runner.graph_steps = GraphSteps(runner.target, parts, packer, 4 if drafter else 1, group_requests=16)
    runner.eager_steps = EagerSteps(runner.target, parts, lambda step: None)
    runner.draft._parts = parts
    runner._separates_decodes = runner._groups_prefixes = True
    launch = runner.launch

    def checked_launch(*arguments):
        step = launch(*arguments)
        if not any(step.layout.drafts):  # with drafts, the host tells the next step its tokens
            slots = [request.slot for request in step.layout.sampled]
            assert runner.target.last_tokens[slots].tolist() == step.tokens.tolist()
        return step

    runner.launch = checked_launch
    assert output_differences(expected, engine.generate(PROMPTS, PARAMS)) == []
    sizes = {key.size for key in runner.graph_steps._decodes.keys}
    verified = [key.size for key in runner.graph_steps._verifications.keys]
    assert {size.rows_per_request for size in sizes} <= {1}
    assert {size.rows_per_request for size in verified} == ({4} if drafter else set())
    assert any(size.requests > 1 for size in [*sizes, *verified])
    if drafter == "eagle":
        assert len(runner.draft._graphs.keys) == len(runner.graph_steps._decodes.keys) + len(verified)
        assert engine.stats()["draft_tokens"] > 10
    if drafter is None:
        assert len(sizes) > 1


def test_steps_with_a_prefill_are_no_graphs(models, monkeypatch):
    monkeypatch.setattr(graph_steps, "StepGraphs", CalledGraphs)
    engine = make_engine(models, "qwen3", None)
    runner = engine.runner
    steps = GraphSteps(runner.target, AttentionParts(runner.page_table), None, 1, 0)
    engine.submit([[1, 2, 3]], SamplingParams(max_tokens=4))
    layout = runner._lay_out(engine.scheduler.schedule())
    assert layout.num_rows == 3
    assert steps.run(layout) is None
