"""Captured hidden states: the bits of a pass of their own, whatever the schedule; and the bounds of the buffer."""

import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.steps.capture import CaptureConfig

SYSTEM = list(range(3, 40))
PROMPTS = [[*SYSTEM, 50 + number, 7] for number in range(3)] * 2 + [[9] * 25, [4, 5]]
PARAMS = [SamplingParams(max_tokens=6 + 5 * i, seed=i, ignore_eos=True) for i in range(len(PROMPTS))]
SETTINGS = {
    "as it comes": {},
    "chunks of 7": {"max_prefill_tokens": 7},
    "preempted": {"kv_cache_tokens": 112, "page_size": 4},
    "speculating": {"draft_model": "ngram", "num_draft_tokens": 4, "draft_max_requests": 64, "draft_min_accepted": 0.0},
}


class HalfRight:
    """Drafts the next two tokens of a known output, and then a wrong one."""

    def __init__(self, outputs):
        self.outputs = {(*o.prompt_ids, len(o.token_ids)): o.token_ids for o in outputs}

    def propose(self, request, num_tokens):
        known = self.outputs[(*request.prompt_ids, request.params.max_tokens)][len(request.logprobs) :]
        return [*known[:2], *[(token + 1) % 131 for token in known[2:3]]][:num_tokens]

    def finished(self, request):
        pass

    def stats(self):
        return {}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1)
    return str(path)


@pytest.fixture(scope="module")
def expected(path):
    """Outputs without capture, and of each finished text the states of one whole prefill."""
    engine = Engine(EngineConfig(model=path))
    outputs = engine.generate(PROMPTS, PARAMS)
    alone = Engine(EngineConfig(model=path, max_running_requests=1, enable_prefix_cache=False))
    capture = alone.start_capture(CaptureConfig((0, 1, 2)))
    texts = [[*output.prompt_ids, *output.token_ids] for output in outputs]
    alone.generate([text[:-1] for text in texts], SamplingParams(max_tokens=1))
    states = {tuple(sequence.token_ids[:-1]): sequence.states for sequence in capture.take()}
    return outputs, {tuple(text): states[tuple(text[:-1])] for text in texts}


@pytest.mark.parametrize("name", SETTINGS)
def test_states_are_those_of_a_pass_of_their_own(path, expected, name):
    outputs, states = expected
    engine = Engine(EngineConfig(model=path, **SETTINGS[name]))
    engine.generate(PROMPTS[:2], PARAMS[:2])  # prompts that the cache now has
    if name == "speculating":
        engine.speculation.drafter = HalfRight(outputs)
    capture = engine.start_capture(CaptureConfig((0, 1, 2)))
    again = engine.generate(PROMPTS, PARAMS)
    assert [(o.token_ids, o.logprobs) for o in again] == [(o.token_ids, o.logprobs) for o in outputs]
    captured = {tuple(sequence.token_ids): sequence for sequence in capture.take()}
    assert captured.keys() == states.keys()
    for text, sequence in captured.items():
        assert torch.equal(sequence.states, states[text]), text
        assert sequence.token_ids[: sequence.num_prompt] in PROMPTS
    if name == "preempted":
        assert engine.stats()["preemptions"] > 0, "the test lost its point"
    if name == "speculating":
        assert engine.stats()["draft_tokens"] > engine.stats()["accepted_draft_tokens"] > 0, "the test lost its point"


def test_only_chosen_requests_are_captured_and_others_use_the_cache(path):
    engine = Engine(EngineConfig(model=path))
    capture = engine.start_capture(CaptureConfig((1,), every=3))
    outputs = engine.generate(PROMPTS, PARAMS)
    assert [len(sequence.token_ids) for sequence in capture.take()] == [
        len(o.prompt_ids) + len(o.token_ids) for i, o in enumerate(outputs) if i % 3 == 0
    ]
    assert [bool(o.num_cached_tokens) for o in outputs[:6:3]] == [False, False]
    assert any(o.num_cached_tokens for o in outputs)
    engine.stop_capture()
    engine.generate(PROMPTS, PARAMS)
    assert not list(capture.take())


def test_the_buffer_goes_to_disk_and_then_forgets_the_oldest(path, tmp_path):
    engine = Engine(EngineConfig(model=path))
    capture = engine.start_capture(CaptureConfig((0, 1, 2)))
    engine.generate(PROMPTS, PARAMS)
    whole = list(capture.take())
    sizes = [sequence.states.nbytes for sequence in whole]
    engine.stop_capture()
    bounds = {"memory_bytes": sum(sizes[-2:]), "disk_bytes": sum(sizes[-5:-2]), "directory": str(tmp_path / "states")}
    capture = engine.start_capture(CaptureConfig((0, 1, 2), **bounds))
    engine.generate(PROMPTS, PARAMS)
    assert len(list((tmp_path / "states").iterdir())) == 3
    assert capture.stats() == {"captured_sequences": 8, "captured_held": 5, "captured_dropped": 3}
    for kept, sequence in zip(capture.take(), whole[-5:], strict=True):
        assert (kept.token_ids, kept.num_prompt) == (sequence.token_ids, sequence.num_prompt)
        assert torch.equal(kept.states, sequence.states)
    assert list((tmp_path / "states").iterdir()) == []


def test_what_cannot_be_captured_is_refused(path):
    engine = Engine(EngineConfig(model=path))
    with pytest.raises(ValueError, match=r"aux_layers=\(4,\): 0 to 3 can be"):
        engine.start_capture(CaptureConfig((4,)))
    with pytest.raises(ValueError, match="disk_bytes needs a directory"):
        CaptureConfig((1,), disk_bytes=1)
    engine.submit([[1, 2]])
    with pytest.raises(RuntimeError, match="unfinished requests"):
        engine.start_capture(CaptureConfig((1,)))
