"""Rewards that a model gives: a reward model's score, or a judge's verdict, both through an engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.pooling import ScoreAt, scored_part
from lockstep.rollout import hub
from lockstep.rollout.chat_template import ChatConfig, apply_template
from lockstep.rollout.end_of_turn import stop_token_ids
from lockstep.rollout.rewards.reward import Completion, Reward
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


class RewardEngines:
    """The engines that rewards ask, one of each config. Use as a context manager."""

    def __init__(self):
        self._engines: dict[EngineConfig, Engine] = {}
        self._at_close: set[Callable[[], None]] = set()

    def at_close(self, close: Callable[[], None]) -> None:
        """Calls it, once, when these engines are closed."""
        self._at_close.add(close)

    def engine(self, model: str, options: Mapping[str, Any]) -> Engine:
        """Raises ValueError for an option that EngineConfig lacks, for a hub id without files, and as Engine does."""
        try:
            config = EngineConfig(model=hub.model_directory(model), **options)
        except TypeError as error:
            raise ValueError(f"engine options of {model}: {error}") from error
        if config not in self._engines:
            self._engines[config] = Engine(config)
        return self._engines[config]

    def __enter__(self) -> RewardEngines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for close in self._at_close:
            close()
        for engine in self._engines.values():
            engine.shutdown()


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], response: str
) -> list[int]:
    """Token ids of a whole conversation, the response as its last turn: what a reward model learns from and scores.

    Raises ValueError as `apply_template` does.
    """
    turns = [*messages, {"role": "assistant", "content": response}]
    text = apply_template(tokenizer, turns, add_generation_prompt=False)
    return tokenizer.encode(text, add_special_tokens=False)


def reward_model_reward(options: RewardModelOptions, engines: RewardEngines) -> Reward:
    """The model's score of the conversation, in its own tokens."""
    engine = engines.engine(options.model, options.engine)
    tokenizer = load_tokenizer(hub.model_directory(options.model), ChatConfig(date=options.date))
    if engine.model_config.head != "scalar":
        raise ValueError(f"{options.model} is no reward model: it is not a ...ForSequenceClassification")

    def reward(completions: Sequence[Completion]) -> list[float]:
        conversations = [conversation_ids(tokenizer, c.problem.messages, c.text) for c in completions]
        return engine.reward(conversations, options.score_at)

    return reward


def judge_reward(options: JudgeOptions, engines: RewardEngines) -> Reward:
    """The verdict of a language model that reads the response."""
    engine = engines.engine(options.model, options.engine)
    chat = ChatConfig(None, options.chat_template_kwargs, options.date)
    tokenizer = load_tokenizer(hub.model_directory(options.model), chat)
    pattern = re.compile(options.pattern)
    sampling = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, stop_token_ids=stop_token_ids(tokenizer)
    )

    def verdict(text: str) -> float:
        found = [match.group(1) for match in pattern.finditer(text)]
        if not found:
            return options.unparsed
        if found[-1] in options.scores:
            return float(options.scores[found[-1]])
        try:
            return float(found[-1])
        except ValueError:
            return options.unparsed

    def reward(completions: Sequence[Completion]) -> list[float]:
        prompts = [
            render_prompt(tokenizer, [{"role": "user", "content": fill_in(options.template, completion)}])
            for completion in completions
        ]
        return [verdict(output.text) for output in engine.generate(prompts, sampling)]

    return reward


def fill_in(template: str, completion: Completion) -> str:
    """The template with {question}, {answer} and {response} filled in; braces in what is filled in mean nothing."""
    values = {
        "question": completion.problem.question,
        "answer": completion.problem.answer,
        "response": completion.text,
    }
    return re.sub(r"\{(question|answer|response)\}", lambda match: values[match.group(1)], template)
