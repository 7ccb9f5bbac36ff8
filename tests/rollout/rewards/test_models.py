"""Reward models and judges as rewards."""

from types import SimpleNamespace

import pytest
import torch
from models import make_hf_model

from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.rewards import Completion, RewardEngines, build_reward
from lockstep.rollout.rewards.failures import FailedScore
from lockstep.rollout.rewards.models import JudgeOptions, conversation_ids, fill_in
from lockstep.rollout.tasks import Problem
from lockstep.rollout.tokenizer import build_tokenizer

PROBLEM = Problem("p", ({"role": "user", "content": "1+1?"},), "2")
PAD_ID, END_ID = 0, 1
COMPLETIONS = [Completion(PROBLEM, text, 1) for text in ("2", "3", "it is {response} 2")]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["1+1? it is 2"], TokenizerConfig(vocab_size=270))


@pytest.mark.parametrize("pad", [None, PAD_ID, END_ID], ids=["none", "own", "eos"])
def test_a_reward_model_scores_the_conversation(pad, tokenizer, tmp_path):
    hf = make_hf_model(tmp_path, "qwen3", seed=1, vocab_size=272, scalar_head=True, pad_token_id=pad)
    tokenizer.save_pretrained(tmp_path)
    options = {"kind": "reward_model", "model": str(tmp_path), "engine": {"kv_cache_tokens": 256}, "weight": 2.0}
    with RewardEngines() as engines:
        rewards = build_reward({"rm": options}, None, engines)(COMPLETIONS)
        assert engines.engine(str(tmp_path), {"kv_cache_tokens": 256}) is engines.engine(
            str(tmp_path), options["engine"]
        )
    for completion, reward in zip(COMPLETIONS, rewards, strict=True):
        ids = conversation_ids(tokenizer, PROBLEM.messages, completion.text)
        assert tokenizer.decode(ids) == f"<|user|>1+1?<|end|><|assistant|>{completion.text}<|end|>"
        with torch.no_grad():
            assert reward == pytest.approx(2.0 * hf(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_a_model_that_cannot_reward_is_named(tokenizer, tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=1, vocab_size=272)
    tokenizer.save_pretrained(tmp_path)
    with RewardEngines() as engines:
        for options, message in (
            ({"model": str(tmp_path), "engine": {"kv_cache_tokens": 256}}, "is no reward model"),
            ({"model": str(tmp_path), "engine": {"kv_tokens": 256}}, "kv_tokens"),
            ({}, "option 'model' is needed"),
        ):
            with pytest.raises(ValueError, match=message):
                build_reward({"reward_model": options}, None, engines)


def test_a_judge_s_verdict(tokenizer, tmp_path):
    """The judge's text is given; how it is asked is the engine's own."""
    tokenizer.save_pretrained(tmp_path)
    texts = ["Verdict: no ... Verdict: yes", "Verdict: no", "I cannot say"]
    asked = []

    def generate(prompts, sampling):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [SimpleNamespace(text=text, error=None if text else "no number") for text in texts]

    class Engines(RewardEngines):
        def engine(self, model, options):
            return SimpleNamespace(generate=generate, prepare=lambda prompts, sampling: None)

        def close(self):
            self._engines = {}
            super().close()

    judge = {"kind": "judge", "model": str(tmp_path), "unparsed": -1.0, "template": "{question} {answer} {response}"}
    with Engines() as engines:
        assert build_reward({"j": judge}, None, engines)(COMPLETIONS) == [1.0, 0.0, -1.0]
        assert asked[2] == "<|user|>1+1? 2 it is {response} 2<|end|><|assistant|>"
        graded = {**judge, "pattern": r"score (\S+)?", "scores": {1: 4.0}, "weight": 0.1}
        grades = build_reward({"j": graded}, None, engines)
        for given, scores in (
            (["score 7", "score 2 score 10", "score none"], [0.7, 1.0, -0.1]),
            (["score nan", "score inf", "score -1e999"], [-0.1, -0.1, -0.1]),
            (["score 1", "score 9 score ", "score \ud800\x00"], [0.4, -0.1, -0.1]),
        ):
            texts[:] = given
            assert grades(COMPLETIONS) == pytest.approx(scores)
        texts[:] = ["score 7", "", "score 2"]  # a request that failed is no verdict
        given = build_reward({"j": {**graded, "weight": 1.0}}, None, engines)(COMPLETIONS)
        assert given == [7.0, 0.0, 2.0]
        assert "no number" in given[1].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "Verdict: yes"}, "has no group: put what counts in it"),
        ({"pattern": "("}, "pattern '\\('"),
        ({"scores": {"yes": "1"}}, "the score of verdict 'yes' must be a finite number, got '1'"),
        ({"unparsed": float("nan")}, "the score of verdict 'unparsed' must be a finite number"),
    ],
)
def test_a_judge_that_can_give_no_score_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JudgeOptions("model", **options)


def test_what_a_model_cannot_take_has_failed_alone(tokenizer, tmp_path):
    """A response may be longer than the models that judge it take, or than their memory holds."""
    make_hf_model(tmp_path / "rm", "qwen3", seed=1, vocab_size=272, scalar_head=True)
    make_hf_model(tmp_path / "lm", "qwen3", seed=1, vocab_size=272)
    for name in ("rm", "lm"):
        tokenizer.save_pretrained(tmp_path / name)
    long = [Completion(PROBLEM, "2" * length, 1) for length in (5000, 1, 100)]
    engine = {"kv_cache_tokens": 64, "page_size": 16}
    judge = {"model": str(tmp_path / "lm"), "engine": engine, "max_tokens": 4, "template": "{response}"}
    with RewardEngines() as engines:
        for terms in ({"reward_model": {"model": str(tmp_path / "rm"), "engine": engine}}, {"judge": judge}):
            scores = build_reward(terms, None, engines)(long)
            assert [isinstance(score, FailedScore) for score in scores] == [True, False, True]
            assert "exceed max_model_len=256" in scores[0].reason
            assert "but the pool has 4 pages" in scores[2].reason


def test_a_judge_through_an_engine(tokenizer, tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=1, vocab_size=272)
    tokenizer.save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "engine": {"kv_cache_tokens": 512}, "max_tokens": 4}
    with RewardEngines() as engines:
        any_text = {**options, "pattern": r"(?s)^(.*)$", "scores": {}, "unparsed": 0.5}
        assert build_reward({"judge": any_text}, None, engines)(COMPLETIONS) == [0.5] * 3


def test_what_is_filled_in_is_not_filled_in_again():
    completion = Completion(PROBLEM, "{answer} {x}", 1)
    assert fill_in("{question}|{response}|{y}", completion) == "1+1?|{answer} {x}|{y}"
