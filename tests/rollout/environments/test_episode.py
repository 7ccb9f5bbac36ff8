"""Episodes on a real engine: tokens in and out, and the same episodes however they are scheduled."""

import gc
import itertools
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
from models import make_hf_model
from user_environments import Echo

from lockstep.engine import Engine, EngineConfig, Generator, RequestOutput, SamplingParams
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import EpisodeLimits, Opening, StepResult
from lockstep.rollout.environments.episode import Episode, play
from lockstep.rollout.guarded import CallFailed, GuardedCalls
from lockstep.rollout.sample import derive_turn_seed
from lockstep.rollout.tasks import Problem
from lockstep.rollout.tokenizer import build_tokenizer

LIMITS = EpisodeLimits(max_turns=3, max_tokens=20, max_episode_tokens=160)
PAGE = 4
# A random model seldom draws the end token: any of these ends a turn as well.
STOP = tuple(range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=5, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    return str(path), tokenizer


@pytest.fixture(scope="module")
def engine(model):
    return Engine(EngineConfig(model=model[0], page_size=PAGE, kv_cache_tokens=8192))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["What is 3 + 4? 12 tokens"] * 3, TokenizerConfig(vocab_size=280))


def turn(token_ids, reason="stop"):
    """A turn that some engine has drawn."""
    count = len(token_ids)
    return RequestOutput(0, 0, 0, [1], token_ids, [-0.5] * count, reason, [0] * count, None, 0, 0)


def new_episodes(tokenizer, limits=LIMITS, count=6, environment=lambda: Echo(3), **options) -> list[Episode]:
    chat, calls = ChatTurns(tokenizer), GuardedCalls(options.pop("timeout_s", 30.0))
    problems = [
        Problem(f"p/{i}", ({"role": "user", "content": "What is 3 + 4?" * (i + 1)},), "7") for i in range(count)
    ]
    return [
        Episode(
            environment,
            problem,
            chat,
            limits,
            SamplingParams(seed=i, stop_token_ids=STOP),
            lambda text: [],
            calls,
            **options,
        )
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


class WholeBatches(Generator):
    """An engine that only takes whole batches, as those of a cluster do."""

    def __init__(self, engine):
        self.engine = engine

    def generate(self, prompts, params=None):
        return self.engine.generate(prompts, params)

    score = stats = shutdown = None


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
        (EpisodeLimits(2, 20, 160), "max_turns"),
        (EpisodeLimits(3, 1, 160), "length"),
        (EpisodeLimits(9, 20, 40), "length"),
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


def failing(method, action):
    """An environment whose method does that, the `reset` of the factory where it is no method."""

    class Failing(Echo):
        pass

    setattr(Failing, method, lambda self, argument: action())
    return lambda: Failing(9)


def raise_(error):
    raise error


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit("no text")


def recurse():
    return recurse()


def hang():
    while True:
        pass


USER = {"role": "user", "content": "?"}
BROKEN = {
    "KeyError: 'state'": lambda: raise_(KeyError("state")),
    "ValueError: bad": lambda: raise_(ValueError("bad")),
    "SystemExit: 3": lambda: raise_(SystemExit(3)),
    "KeyboardInterrupt": lambda: raise_(KeyboardInterrupt),
    "StopIteration": lambda: raise_(StopIteration),
    "MemoryError": lambda: raise_(MemoryError),
    "RecursionError: maximum": recurse,
    "Unprintable": lambda: raise_(Unprintable()),
    "RuntimeError: two\\nlines \\x1b": lambda: raise_(RuntimeError("two\nlines \x1b[2J")),
    "timeout: no answer within 0.2 s": hang,
    "timeout: no answer within 0.2 s ": lambda: time.sleep(60),
}
RESULTS = {
    "returned a NoneType; it must return": lambda: None,
    "returned a dict; it must return": lambda: {"observation": [USER]},
}
STEPS = {
    "is empty; it needs a message or a token": StepResult,
    "is a str; it must be a list of messages": lambda: StepResult("higher"),
    "is a dict; it must be a list of messages": lambda: StepResult(USER),
    "is a NoneType; it must be a list": lambda: StepResult(None),
    "holds a float, which is neither": lambda: StepResult([1.5]),
    "holds a bool, which is neither": lambda: StepResult([True]),
    "holds a str, which is neither": lambda: StepResult(["higher"]),
    "holds token id 99999, outside the vocabulary": lambda: StepResult([1, 99999]),
    "holds token id -1, outside the vocabulary": lambda: StepResult([-1]),
    "message 1 is a str, not a mapping": lambda: StepResult([USER, "higher"]),
    "message 0: its 'content' is a int, not a text": lambda: StepResult([{"role": "user", "content": 7}]),
    "message 0: its 'content' is a NoneType, not a text": lambda: StepResult([{"role": "tool", "content": None}]),
    "message 0: its 'role' is a NoneType, not a text": lambda: StepResult([{"content": "7"}]),
    "reward of a StepResult must be finite, got nan": lambda: StepResult([USER], reward=float("nan")),
    "reward of a StepResult must be a number, got None": lambda: StepResult([USER], reward=None),
    "reward of a StepResult must be a number, got 'x'": lambda: StepResult([USER], reward="x"),
}
OPENINGS = {
    "the prompt of an Opening is empty": lambda: Opening(()),
    "the prompt of an Opening is a str": lambda: Opening("1 + 1?"),
    "message 0: its 'content' is a list": lambda: Opening([{"role": "user", "content": ["?"]}]),
    "a prompt of 200 tokens, and an episode of 160": lambda: Opening([5] * 200),
}


@pytest.mark.parametrize(
    ("method", "reason", "action"),
    [("step", *case) for case in {**BROKEN, **RESULTS, **STEPS}.items()]
    + [("reset", *case) for case in {**BROKEN, **RESULTS, **OPENINGS}.items()],
)
def test_whatever_an_environment_does_is_the_failure_of_its_episode(tokenizer, method, reason, action):
    timeout_s = 0.2 if "timeout" in reason and method == "reset" else 30.0
    (episode,) = new_episodes(tokenizer, count=1, environment=failing(method, action), timeout_s=timeout_s)
    if method == "step":
        episode.calls.timeout_s = 0.2 if "timeout" in reason else 30.0
        episode.next_request()
        episode.advance(turn([5, 6]))
    (failure,) = episode.failures
    assert str(failure).startswith(f"Failing.{method} failed at turn 0 of p/0: ")
    assert reason.strip() in str(failure)
    assert episode.finish_reason == "error"
    assert episode.turn_rewards == [0.0] * (method == "step")


@pytest.mark.parametrize("max_retries", [0, 2])
def test_a_turn_without_numbers_is_the_failure_of_its_episode(tokenizer, max_retries):
    broken = replace(turn([5], "abort"), error="request 7, position 3: no number")
    (episode,) = new_episodes(tokenizer, count=1, max_retries=max_retries)
    seeds = []
    for _ in range(1 + max_retries):
        assert episode.finish_reason is None
        episode.next_request()
        episode.advance(turn([5, 6]))
        episode.next_request()
        seeds.append(tuple(episode.turn_seeds))
        episode.advance(broken)
    assert len(set(seeds)) == 1
    assert [str(f) for f in episode.failures] == [
        "engine failed at turn 1 of p/0: request 7, position 3: no number"
    ] * (1 + max_retries)
    assert (episode.finish_reason, episode.turn_rewards) == ("error", [0.0, 0.0])
    assert episode.transcript.response_ids[:2] == [5, 6]


def test_a_request_that_fails_ends_its_episode_alone(model, reference):
    engine = Engine(EngineConfig(model=model[0], page_size=PAGE, kv_cache_tokens=8192))
    broken, *others = episodes = new_episodes(model[1])
    collect, failed = engine.runner.collect, []

    def without_numbers(step):
        """The first episode's first result is none."""
        collected = collect(step)
        hit = [r for r in collected.served if r.seed == derive_turn_seed(0, 0) and not failed]
        failed.extend(hit)
        return collected._replace(served=[r for r in collected.served if r not in hit], broken=hit)

    engine.runner.collect = without_numbers
    play(engine, episodes)
    assert not engine.scheduler.has_work
    assert broken.finish_reason == "error"
    assert "the logits hold no number" in str(broken.failures[0])
    assert played(others) == played(reference[1:])


def test_episodes_go_on_where_an_update_collected_their_results(model, reference):
    """On a GPU a pass is in flight between two steps: its results come by the update and by no step."""
    engine = Engine(EngineConfig(model=model[0], page_size=PAGE, kv_cache_tokens=8192))
    engine.overlaps = True
    weights = list(engine.weight_targets.items())
    make_step = engine.step

    def step_and_update():
        results = make_step()
        engine.update_weights(weights, engine.weight_version + 1)
        return results

    engine.step = step_and_update
    episodes = new_episodes(model[1])
    play(engine, episodes)
    assert [e.transcript.response_ids for e in episodes] == [e.transcript.response_ids for e in reference]


def test_a_failed_episode_leaves_the_others_alone(model, engine, reference):
    broken = new_episodes(model[1], count=2, environment=failing("step", hang), timeout_s=0.2)
    begun_badly = new_episodes(model[1], count=1, environment=failing("reset", hang), timeout_s=0.2)
    others = new_episodes(model[1], count=2)
    play(engine, [*begun_badly, broken[0], *others, broken[1]])
    assert not engine.scheduler.has_work
    assert {episode.finish_reason for episode in broken} <= {"error", "length"}
    assert begun_badly[0].finish_reason == "error"
    assert begun_badly[0].transcript.response_ids == []
    assert played(others) == played(reference[:2])


def test_an_environment_that_cannot_be_made_is_a_failure(tokenizer):
    (episode,) = new_episodes(tokenizer, count=1, environment=lambda: raise_(OSError("no room")))
    assert str(episode.failures[0]) == "the environment's creation failed at turn 0 of p/0: OSError: no room"


def test_ctrl_c_is_the_users(tokenizer):
    """Also where the environment is asked in the run's own thread, in which the two cannot be told apart."""
    with pytest.raises(KeyboardInterrupt):
        new_episodes(
            tokenizer, count=1, environment=failing("reset", lambda: raise_(KeyboardInterrupt)), timeout_s=None
        )
    (episode,) = new_episodes(tokenizer, count=1, environment=failing("reset", sys.exit), timeout_s=None)
    assert episode.finish_reason == "error"
    pressed = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    asks_late = failing("reset", lambda: (pressed.start(), time.sleep(60)))
    with pytest.raises(KeyboardInterrupt):
        new_episodes(tokenizer, count=1, environment=asks_late)


def test_a_thread_that_is_given_up_ends_and_others_answer(tokenizer):
    calls, before = GuardedCalls(0.2), threading.active_count()
    with pytest.raises(CallFailed, match="timeout: no answer within"):
        calls.call(hang)
    calls.timeout_s = 30.0
    assert calls.call(int, "7") == 7
    del calls
    gc.collect()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


class Flaky(Echo):
    """Fails now and then, by a count that its episodes share."""

    def __init__(self, calls, failing):
        super().__init__(3)
        self.calls, self.failing = calls, failing

    def count(self):
        if next(self.calls) in self.failing:
            raise ConnectionError("gone")

    def reset(self, problem):
        self.count()
        return super().reset(problem)

    def step(self, action):
        self.count()
        return super().step(action)


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 1}, {1, 4}])
def test_a_retried_episode_is_the_one_that_did_not_fail(model, engine, reference, failing):
    calls = itertools.count()
    (episode,) = new_episodes(model[1], count=1, environment=lambda: Flaky(calls, failing), max_retries=2)
    play(engine, [episode])
    assert len(episode.failures) == len(failing)
    assert played([episode]) == played(reference[:1])


def test_retries_end(tokenizer):
    environment = failing("reset", lambda: raise_(ConnectionError("gone")))
    (episode,) = new_episodes(tokenizer, count=1, environment=environment, max_retries=3)
    assert episode.finish_reason == "error"
    assert len(episode.failures) == 4


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_stored_failure_is_played_again_where_it_was(tokenizer, turns):
    """The environment is well again: the stored episode decides."""
    (episode,) = new_episodes(tokenizer, count=1, ends_after=turns)
    for number in range(turns):
        assert episode.finish_reason is None
        episode.next_request()
        episode.advance(turn([5, 6, number]))
    assert episode.finish_reason == "error"
    assert episode.turn_rewards == [0.0] * turns
    assert sum(episode.transcript.written) == 3 * turns
