"""What a rollout produces: samples, each with everything needed to train on it and to generate it again."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FOR_READERS = ("reference", "advantage")  # fields that say nothing of how a sample was drawn


@dataclass(frozen=True)
class Sample:
    """One scored response. `logprobs[t]` and `weight_versions[t]` belong to `response_ids[t]`.

    step, prompt_index, sample_index: the coordinates of the seed. `step` is the one whose turn the prompt was in the
    order of the data; a filter or over-sampling may have moved the sample to another.

    Of an episode of several turns, the response is all that follows the first prompt. The tokens that the policy did
    not write have no log-prob, and `response_mask` is false there; None: it wrote them all. Turn k is the k-th run of
    written tokens, drawn with turn_seeds[k]; `text` is the last turn's; turn_rewards sum up to `reward`. Samples of one
    turn leave these empty.

    For readers alone (FOR_READERS): the problem's reference answer, and the advantage that the step learned with (the
    mean over the written tokens; None: nothing was learned from the sample, or not yet).
    """

    problem_id: str
    step: int
    prompt_index: int
    sample_index: int
    seed: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    weight_versions: tuple[int, ...]
    finish_reason: str
    text: str
    reward: float
    correct: bool
    response_mask: tuple[bool, ...] | None = None
    turn_seeds: tuple[int, ...] = ()
    turn_rewards: tuple[float, ...] = ()
    reference: str = ""
    advantage: float | None = None

    @property
    def written(self) -> Sequence[bool]:
        """For each token of the response: did the policy write it?"""
        return [True] * len(self.response_ids) if self.response_mask is None else self.response_mask

    def record(self) -> dict[str, Any]:
        """A JSON-ready dict; floats keep every bit, since JSON writes the shortest decimal that reads back equal."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Sample:
        """The sample of a record that may have been through JSON, where tuples are lists."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def derive_seed(run_seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """The 63-bit seed of one sample: a hash of its coordinates, so that any rollout can be generated again."""
    packed = struct.pack("<4q", run_seed, step, prompt_index, sample_index)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def derive_turn_seed(seed: int, turn: int) -> int:
    """The seed of an episode's turn: the sample's own for turn 0, then a hash of it and the turn."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(struct.pack("<2q", seed, turn), digest_size=8).digest(), "little") >> 1


def digest(samples: Iterable[Sample]) -> str:
    """sha256 over the problem, tokens and log-probs of samples in their given order.

    Two evaluations of the same weights on the same problems have the same digest, whatever the batch size, the engine
    settings or the number of engines.
    """
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(f"{sample.problem_id}\n".encode())
        sha.update(struct.pack(f"<{len(sample.response_ids)}q", *sample.response_ids))
        drawn = [logprob for logprob in sample.logprobs if logprob is not None]
        sha.update(struct.pack(f"<{len(drawn)}d", *drawn))
    return sha.hexdigest()
