"""Sampling parameters of every kind, drawn at random."""

import random

from lockstep.engine import SamplingParams


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randint(1, 40),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.0, 1.5]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        top_k=rng.choice([-1, -1, 20]),
        min_p=rng.choice([0.0, 0.0, 0.02]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        logit_bias=rng.choice([None, None, {5: 3.0, 7: -4.0}]),
        seed=rng.randrange(2**40),
        ignore_eos=rng.random() < 0.5,
    )
