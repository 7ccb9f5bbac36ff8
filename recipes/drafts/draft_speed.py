"""What a run's draft is worth in time: decoding some of its samples again, with drafts and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.rollout.sample import Sample
from lockstep.trainer_bridge import MegatronTrainer, publish

TIMED = 3  # calls, of which the median counts, after one to warm up


def decode_speed(
    engine: EngineConfig, draft: Path, trainer: MegatronTrainer, samples: Sequence[Sample], temperature: float
) -> dict[str, float]:
    """Tokens per second of both, and their ratio, for these samples together, with the trainer's weights.

    engine: with drafts, of which those in the directory `draft` serve; without them it is another engine. Raises
    AssertionError where drafts change a token.
    """
    without = replace(engine, draft_model=None, num_draft_tokens=0)
    plain_s, plain_tokens = _timed(without, trainer, samples, temperature)
    drafted_s, drafted_tokens = _timed(replace(engine, draft_model=str(draft)), trainer, samples, temperature)
    assert plain_tokens == drafted_tokens, "a draft changed tokens"
    num_tokens = sum(map(len, plain_tokens))
    return {
        "draft/speed_up": plain_s / drafted_s,
        "draft/tokens_per_s_with": num_tokens / drafted_s,
        "draft/tokens_per_s_without": num_tokens / plain_s,
    }


def _timed(
    config: EngineConfig, trainer: MegatronTrainer, samples: Sequence[Sample], temperature: float
) -> tuple[float, list[list[int]]]:
    """(seconds, tokens) of drawing as many tokens as each sample has."""
    engine = Engine(config)
    publish(trainer, engine, version=1)
    prompts = [list(sample.prompt_ids) for sample in samples]
    params = [
        SamplingParams(max_tokens=len(sample.response_ids), temperature=temperature, seed=sample.seed, ignore_eos=True)
        for sample in samples
    ]
    outputs = engine.generate(prompts, params)
    seconds = []
    for _ in range(TIMED):
        started = time.perf_counter()
        engine.generate(prompts, params)
        seconds.append(time.perf_counter() - started)
    engine.shutdown()
    return statistics.median(seconds), [output.token_ids for output in outputs]
