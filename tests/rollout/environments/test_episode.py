"""Episodes on a real engine: tokens in and out, and the same episodes however they are scheduled."""

import pytest
from models import make_hf_model
from user_environments import Echo

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import Limits, StepResult
from lockstep.rollout.environments.episode import Episode, play
from lockstep.rollout.sample import derive_turn_seed
from lockstep.rollout.tasks import Problem
from lockstep.rollout.tokenizer import TokenizerConfig, build_tokenizer

LIMITS = Limits(max_turns=3, max_tokens=20, max_episode_tokens=160)
PAGE = 4
# A random model seldom draws the end token: any of these ends a turn as well.
STOP = tuple(range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(["What is 3 + 4? 12 tokens"] * 3, TokenizerConfig(vocab_size=280))
    make_hf_model(path, "qwen3", seed=5, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    return str(path), tokenizer


@pytest.fixture(scope="module")
def engine(model):
    return Engine(EngineConfig(model=model[0], page_size=PAGE, kv_cache_tokens=8192))


def new_episodes(tokenizer, limits=LIMITS, count=6, environment=lambda: Echo(3)) -> list[Episode]:
    chat = ChatTurns(tokenizer)
    problems = [
        Problem(f"p/{i}", ({"role": "user", "content": "What is 3 + 4?" * (i + 1)},), "7") for i in range(count)
    ]
    return [
        Episode(environment(), problem, chat, limits, SamplingParams(seed=i, stop_token_ids=STOP), lambda text: [])
        for i, problem in enumerate(problems)
    ]


def played(episodes: list[Episode]) -> list[tuple]:
    return [(e.transcript, e.finish_reason, e.turn_rewards, e.turn_seeds, e.last_text) for e in episodes]


@pytest.fixture(scope="module")
def reference(model, engine):
    """Each episode played alone."""
    episodes = new_episodes(model[1])
    for episode in episodes:
        play(engine, [episode])
    return episodes


def test_the_policys_tokens_have_the_engines_log_probs_and_the_others_none(engine, reference):
    assert max(len(episode.turn_rewards) for episode in reference) == 3
    for episode in reference:
        transcript = episode.transcript
        scored = engine.score([transcript.token_ids])[0][len(transcript.prompt_ids) :]
        for written, logprob, score in zip(transcript.written, transcript.logprobs, scored, strict=True):
            assert logprob == (score if written else None)
        assert len(transcript.weight_versions) == len(transcript.response_ids)


def test_each_turn_goes_on_from_the_drawn_tokens(model, engine, reference):
    """The written runs are what the engine gives for the tokens before them, with the turn's own seed."""
    tokenizer = model[1]
    for episode in reference:
        transcript, seed = episode.transcript, episode.sampling.seed
        starts = [t for t, w in enumerate(transcript.written) if w and (t == 0 or not transcript.written[t - 1])]
        assert len(starts) == len(episode.turn_rewards)
        for turn, start in enumerate(starts):
            prompt = transcript.prompt_ids + transcript.response_ids[:start]
            turn_seed = derive_turn_seed(seed, turn)
            params = SamplingParams(seed=turn_seed, max_tokens=LIMITS.max_tokens, stop_token_ids=STOP)
            (output,) = engine.generate([prompt], params)
            drawn = transcript.response_ids[start : start + len(output.token_ids)]
            assert drawn == output.token_ids
            after = transcript.response_ids[start + len(drawn) :]
            if turn + 1 < len(starts):
                said = tokenizer.encode(f"<|user|>{len(drawn)} tokens<|end|><|assistant|>", add_special_tokens=False)
                assert after[: len(said)] == said
            else:
                assert after == []


class WholeBatches:
    """An engine that only takes whole batches, as those of a cluster do."""

    def __init__(self, engine):
        self.generate = engine.generate


def test_scheduling_changes_no_episode(model, engine, reference):
    together, in_rounds = new_episodes(model[1]), new_episodes(model[1])
    before = engine.stats()["cached_tokens"]
    play(engine, together)
    assert engine.stats()["cached_tokens"] > before
    play(WholeBatches(engine), in_rounds)
    assert played(together) == played(in_rounds) == played(reference)


def test_a_turn_reuses_the_pages_of_the_turns_before(model):
    engine = Engine(EngineConfig(model=model[0], page_size=PAGE, kv_cache_tokens=8192))
    (episode,) = new_episodes(model[1], count=1, environment=lambda: Echo(2))
    prompt, params = episode.next_request()
    (first,) = engine.generate([prompt], params)
    episode.advance(first)
    assert episode.finish_reason is None
    prompt, params = episode.next_request()
    (second,) = engine.generate([prompt], params)
    known = len(first.prompt_ids) + len(first.token_ids) - 1  # the last token's KV was never computed
    assert second.num_cached_tokens == known // PAGE * PAGE


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(2, 20, 160), "max_turns"),
        (Limits(3, 1, 160), "length"),
        (Limits(9, 20, 40), "length"),
    ],
)
def test_episodes_end_where_their_room_ends(model, engine, limits, reason):
    episodes = new_episodes(model[1], limits, count=2, environment=lambda: Echo(9))
    play(engine, episodes)
    assert reason in {episode.finish_reason for episode in episodes}
    for episode in episodes:
        assert len(episode.transcript.token_ids) <= limits.max_episode_tokens
        assert len(episode.turn_rewards) <= limits.max_turns
        assert episode.transcript.written[-1]


class Broken(Echo):
    def step(self, action):
        raise KeyError("state")


class Silent(Echo):
    def step(self, action):
        return StepResult()


def test_a_failing_environment_is_named_and_leaves_no_request_behind(model, engine):
    with pytest.raises(RuntimeError, match=r"Broken.step failed at turn 0 of p/\d"):
        play(engine, new_episodes(model[1], environment=lambda: Broken(1)))
    assert not engine.scheduler.has_work
    with pytest.raises(ValueError, match="needs an observation"):
        play(engine, new_episodes(model[1], environment=lambda: Silent(1)))
    assert not engine.scheduler.has_work


def test_a_prompt_without_room_for_a_turn_is_refused(model):
    with pytest.raises(ValueError, match=r"p/0 has \d+ tokens, and an episode 4"):
        new_episodes(model[1], Limits(3, 20, 4), count=1)
