"""Rewards that a model gives: a reward model's score, or a judge's verdict, both through an engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.rollout.rewards.reward import Completion, Reward
from lockstep.rollout.tokenizer import load_tokenizer, render_prompt


@dataclass(frozen=True)
class RewardModelOptions:
    """model: an HF directory (...ForSequenceClassification with one label); engine: other options of EngineConfig."""

    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeOptions:
    """model, engine: a language model's, as for a reward model.

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


class RewardEngines:
    """The engines that rewards ask, one of each config. Use as a context manager."""

    def __init__(self):
        self._engines: dict[EngineConfig, Engine] = {}

    @staticmethod
    def config(model: str, options: Mapping[str, Any]) -> EngineConfig:
        """Raises ValueError for an option that EngineConfig lacks."""
        try:
            return EngineConfig(model=model, **options)
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
        for engine in self._engines.values():
            engine.shutdown()


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], response: str
) -> list[int]:
    """Token ids of a whole conversation, the response as its last turn: what a reward model learns from and scores.

    Raises ValueError when the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template")
    turns = [*(dict(message) for message in messages), {"role": "assistant", "content": response}]
    return tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)


def reward_model_reward(options: RewardModelOptions, engines: RewardEngines) -> Reward:
    """The model's score of the conversation, in its own tokens."""
    engine, tokenizer = engines.engine(options.model, options.engine), load_tokenizer(options.model)
    if engine.model_config.head != "scalar":
        raise ValueError(f"{options.model} is no reward model: it is not a ...ForSequenceClassification")

    def reward(completions: Sequence[Completion]) -> list[float]:
        return engine.reward([conversation_ids(tokenizer, c.problem.messages, c.text) for c in completions])

    return reward


def judge_reward(options: JudgeOptions, engines: RewardEngines) -> Reward:
    """The verdict of a language model that reads the response."""
    engine, tokenizer = engines.engine(options.model, options.engine), load_tokenizer(options.model)
    pattern = re.compile(options.pattern)
    sampling = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, stop_token_ids=(tokenizer.eos_token_id,)
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
