"""Rewards that a model gives: a reward model's score, or a judge's verdict, both through an engine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.pooling import ScoreAt, scored_part
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.end_of_turn import stop_token_ids
from lockstep.engine.text.plain_content import encode_conversation
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.rollout import hub
from lockstep.rollout.rewards.failures import FailedScore, FailureWarnings
from lockstep.rollout.rewards.isolation import Limits
from lockstep.rollout.rewards.reward import Completion, Reward
from lockstep.rollout.rewards.text_rewards import compile_pattern, text_check
from lockstep.rollout.rewards.verifiers import Verifier, VerifierPool, open_pool
from lockstep.rollout.tokenizer import load_tokenizer, render_prompt


@dataclass(frozen=True)
class RewardModelOptions:
    """model: an HF directory (...ForSequenceClassification with one label), or one of the hub, org/name@revision.

    engine: other options of EngineConfig. date: see ChatConfig; null: the run's.
    score_at: whose token's value is the score: "last_non_pad", as transformers has it, or "last"; engine/pooling.py.
    """

    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    score_at: ScoreAt = "last_non_pad"

    def __post_init__(self):
        scored_part([], None, self.score_at)


@dataclass(frozen=True)
class JudgeOptions:
    """model, engine, date: a language model's, as for a reward model. chat_template_kwargs: see ChatConfig.

    template: what the judge is asked; {question}, {answer} (the reference) and {response} are filled in.
    pattern: its first group, where it is found last in the judge's text, is the verdict: a number, or a key of scores.
    scores: of verdicts that are words. unparsed: the score of a text without a verdict.
    limits: of the search for the verdict, in an isolated process.
    """

    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    template: str = (
        "Question: {question}\nReference answer: {answer}\nResponse: {response}\n\n"
        "Is the response's final answer right? End with the line: Verdict: yes, or: Verdict: no"
    )
    pattern: str = r"Verdict:\s*(yes|no)"
    scores: Mapping[str, float] = field(default_factory=lambda: {"yes": 1.0, "no": 0.0})
    unparsed: float = 0.0
    max_tokens: int = 512
    temperature: float = 0.0
    date: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self):
        compile_pattern(self.pattern, num_groups=1)
        for verdict, score in {**self.scores, "unparsed": self.unparsed}.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise ValueError(f"the score of verdict {verdict!r} must be a finite number, got {score!r}")


class RewardEngines:
    """The engines that rewards ask, one of each config, and the verifiers' processes. Use as a context manager."""

    def __init__(self):
        self._engines: dict[EngineConfig, Engine] = {}
        self._pools: list[VerifierPool] = []

    def pool(self, verifier: Verifier, num_workers: int) -> VerifierPool:
        """The processes of a verifier; several rewards, and the same reward for several tasks, share them."""
        for pool in self._pools:
            if (pool.verifier, pool.num_workers) == (verifier, num_workers):
                return pool
        self._pools.append(VerifierPool(verifier, num_workers))
        return self._pools[-1]

    @staticmethod
    def config(model: str, options: Mapping[str, Any]) -> EngineConfig:
        """Raises ValueError for an option that EngineConfig lacks, and for a hub id without files."""
        try:
            return EngineConfig(model=hub.model_directory(model), **options)
        except TypeError as error:
            raise ValueError(f"engine options of {model}: {error}") from error

    def engine(self, model: str, options: Mapping[str, Any]) -> Engine:
        """Raises ValueError as `config` and Engine do."""
        config = self.config(model, options)
        if config not in self._engines:
            self._engines[config] = Engine(config)
        return self._engines[config]

    def __enter__(self) -> RewardEngines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        for engine in self._engines.values():
            engine.shutdown()


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], response: str) -> list[int]:
    """Token ids of a whole conversation, the response as its last turn: what a reward model learns from and scores.

    Raises ValueError as `apply_template` does.
    """
    turns = [*messages, {"role": "assistant", "content": response}]
    return encode_conversation(tokenizer, turns, add_generation_prompt=False)


def reward_model_reward(options: RewardModelOptions, engines: RewardEngines) -> Reward:
    """The model's score of the conversation, in its own tokens. One that the model cannot take has failed."""
    engine = engines.engine(options.model, options.engine)
    tokenizer = load_tokenizer(hub.model_directory(options.model), ChatConfig(date=options.date))
    if engine.model_config.head != "scalar":
        raise ValueError(f"{options.model} is no reward model: it is not a ...ForSequenceClassification")
    warnings = FailureWarnings("reward_model")

    def reward(completions: Sequence[Completion]) -> list[float]:
        conversations = [conversation_ids(tokenizer, c.problem.messages, c.text) for c in completions]
        refused = _refused(completions, warnings, lambda i: engine.prepare([conversations[i]], kind="reward"))
        taken = [conversation for i, conversation in enumerate(conversations) if i not in refused]
        return _with_refused(engine.reward(taken, options.score_at), refused, len(completions))

    return reward


def judge_reward(options: JudgeOptions, engines: RewardEngines) -> Reward:
    """The verdict of a language model that reads the response. A prompt that it cannot take has failed."""
    engine = engines.engine(options.model, options.engine)
    chat = ChatConfig(None, options.chat_template_kwargs, options.date)
    tokenizer = load_tokenizer(hub.model_directory(options.model), chat)
    warnings = FailureWarnings("judge")
    scores = {str(verdict): score for verdict, score in options.scores.items()}
    check = text_check(
        "judge", "verdict_check", options.limits, pattern=options.pattern, scores=scores, unparsed=options.unparsed
    )
    pool = open_pool(check, 1, engines)
    sampling = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, stop_token_ids=stop_token_ids(tokenizer)
    )

    def reward(completions: Sequence[Completion]) -> list[float]:
        prompts = [
            render_prompt(tokenizer, [{"role": "user", "content": fill_in(options.template, completion)}])
            for completion in completions
        ]
        refused = _refused(completions, warnings, lambda i: engine.prepare([prompts[i]], sampling))
        taken = [i for i in range(len(prompts)) if i not in refused]
        outputs = dict(zip(taken, engine.generate([prompts[i] for i in taken], sampling), strict=True))
        for i, output in outputs.items():
            if output.error is not None:
                refused[i] = warnings.failed(completions[i].problem.problem_id, output.error)
        verdicts = pool.verify([(completions[i].problem, o.text) for i, o in outputs.items() if i not in refused])
        return _with_refused(verdicts, refused, len(completions))

    return reward


def _refused(
    completions: Sequence[Completion], warnings: FailureWarnings, prepare: Callable[[int], object]
) -> dict[int, FailedScore]:
    """By index: what the engine cannot take, such as a response that is too long for this model."""
    refused = {}
    for index, completion in enumerate(completions):
        try:
            prepare(index)
        except ValueError as error:
            reason = str(error).partition(": ")[2]  # without the number of a prompt that stands alone
            refused[index] = warnings.failed(completion.problem.problem_id, reason)
    return refused


def _with_refused(scores: Sequence[float], refused: Mapping[int, FailedScore], count: int) -> list[float]:
    rest = iter(scores)
    return [refused[index] if index in refused else next(rest) for index in range(count)]


def fill_in(template: str, completion: Completion) -> str:
    """The template with {question}, {answer} and {response} filled in; braces in what is filled in mean nothing."""
    values = {
        "question": completion.problem.question,
        "answer": completion.problem.answer,
        "response": completion.text,
    }
    return re.sub(r"\{(question|answer|response)\}", lambda match: values[match.group(1)], template)
