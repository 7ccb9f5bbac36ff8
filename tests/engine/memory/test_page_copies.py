"""A step that copies pages before it stores anything: a request whose KV moves goes on with the same bits."""

import pytest
from drafts import make_draft
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import save_draft
from lockstep.engine.models.config import load_model_config
from lockstep.engine.request import Request

PARAMS = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
PROMPT = list(range(5, 40))
Drafts = dict[int, list[int]]


def make_engine(tmp_path_factory, family: str, with_draft: bool) -> Engine:
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, family, seed=5)
    options = {}
    if with_draft:
        options = {"draft_model": str(path / "draft"), "num_draft_tokens": 3, "draft_min_accepted": 0.0}
        save_draft(options["draft_model"], make_draft(load_model_config(str(path)), draft_vocab_size=60, seed=4))
    # Without the prefix cache a page that is given back is anybody's at once.
    engine = Engine(EngineConfig(model=str(path), kv_cache_tokens=512, enable_prefix_cache=False, **options))
    if with_draft:
        engine.speculation.policy.allows_step = engine.speculation.policy.allows = lambda _: True  # not only if it pays
    return engine


@pytest.fixture(scope="module", params=[("qwen3", False), ("deepseek_v3", False), ("qwen3", True)], ids=str)
def engine(request, tmp_path_factory):
    return make_engine(tmp_path_factory, *request.param)


def generate(
    engine: Engine, moves: bool = True, copies: bool = True
) -> tuple[list[int], list[float], dict[int, list[int]]]:
    """The output of a request, and its drafts by the number of tokens before them.

    moves: in the midst it gets other pages, and its own are another request's from then on. copies: the step copies
    them before.
    """
    (request,) = engine.submit([PROMPT], PARAMS)
    while len(request.output_ids) < 9:
        engine.step()
    if moves:
        move(engine, request, copies)
        engine.submit([[7] * 80], SamplingParams(max_tokens=4, ignore_eos=True))
    drafts = {}
    while engine.scheduler.has_work:
        engine.step()
        if request.drafter_state is not None:
            drafts.update([request.drafter_state])
    return request.output_ids, request.logprobs, drafts


def move(engine: Engine, request: Request, copies: bool) -> None:
    """A step in which the request's KV moves to other pages."""
    old, new = request.pages, engine.memory.take(len(request.pages))
    request.pages, request.num_pages_synced = new, 0
    schedule = engine.scheduler.schedule
    page_copies = list(zip(old, new, strict=True)) if copies else []
    engine.scheduler.schedule = lambda: schedule()._replace(page_copies=page_copies)
    engine.step()
    engine.scheduler.schedule = schedule
    engine.memory.give_back(old)


def test_a_request_goes_on_in_other_pages_with_the_same_bits(engine):
    tokens, logprobs, drafts = generate(engine, moves=False)
    moved_tokens, moved_logprobs, moved_drafts = generate(engine)
    assert (moved_tokens, moved_logprobs) == (tokens, logprobs)
    assert moved_drafts == {length: drafts[length] for length in moved_drafts}
    assert bool(moved_drafts) == (engine.config.draft_model is not None)
    assert generate(engine, copies=False)[1] != logprobs  # what was in the other pages is something else
    assert engine.memory.num_free == engine.memory.num_pages
