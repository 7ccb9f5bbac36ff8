"""A draft that learns during reinforcement learning, from the hidden states of the rollouts themselves.

    stage = DraftStage(config, engine, seed)                    # before the first rollout
    metrics = stage.after_rollout(groups, step)                 # one line in the loop
    stage.save(folder / "draft") / stage.load(folder / "draft") # with the run's checkpoints

Which draft serves changes no token, so none of this can change what the run learns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lockstep.engine import Engine
from lockstep.engine.capture import CaptureConfig
from lockstep.engine.draft_checkpoint import load_draft
from lockstep.engine.models.eagle3 import Eagle3Draft
from lockstep.recipes.draft import draft_sequence
from lockstep.rollout.sample import Sample
from lockstep.trainer_bridge.draft_batch import DraftSequence
from lockstep.trainer_bridge.draft_trainer import DraftTrainer, DraftTrainerConfig
from lockstep.trainer_bridge.unrolled_draft import UnrolledDraft

# Gives an engine new draft weights, in place and with a version: Engine.update_draft, where it serves an EAGLE-3 draft.
Publish = Callable[[Iterable[tuple[str, torch.Tensor]], int], None]


@dataclass(frozen=True)
class DraftStageConfig:
    """start: the draft directory that the engine serves too.
    train_every: steps of the loop between trainings. sequences_per_update: captured samples in an update.
    capture_every: one sample of so many is captured, by its seed.
    held_out_every: one captured sample of so many is not trained on, and judges whether a draft is published.
    memory_gb: of captured states in host memory; beyond it the oldest are dropped.
    """

    start: str
    train_every: int = 1
    sequences_per_update: int = 16
    capture_every: int = 1
    held_out_every: int = 8
    memory_gb: float = 4.0
    trainer: DraftTrainerConfig = field(default_factory=DraftTrainerConfig)

    def __post_init__(self):
        for name in ("train_every", "sequences_per_update", "capture_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"DraftStageConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.held_out_every < 2:
            raise ValueError(f"DraftStageConfig.held_out_every must be at least 2, got {self.held_out_every}")


class DraftStage:
    """engine: captures the states. publish: None trains and judges drafts which nothing serves."""

    def __init__(self, config: DraftStageConfig, engine: Engine, publish: Publish | None = None):
        self.config = config
        self.hidden_size = engine.model_config.hidden_size
        self.publish = publish
        head = engine.model.head_weight
        self.draft, self.served = (self._read_draft(engine) for _ in range(2))
        self.trainer = DraftTrainer(config.trainer, self.draft, head)
        c = config.trainer
        self.served_unrolled = UnrolledDraft(
            self.served, head, c.num_steps, c.temperature, c.max_tokens_per_micro_batch
        )
        self.version = 0  # of the served draft: the step after which it was published
        memory_bytes = int(config.memory_gb * 2**30)
        self.capture = engine.start_capture(
            CaptureConfig(self.draft.config.aux_layers, config.capture_every, memory_bytes)
        )
        self._fresh: list[DraftSequence] = []
        self._held_out: list[DraftSequence] = []

    def _read_draft(self, engine: Engine) -> Eagle3Draft:
        embedding = engine.model.embedding.word_embeddings.weight
        return load_draft(self.config.start, engine.model_config, embedding, embedding.dtype)

    def after_rollout(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """Takes the states of the groups' samples; when it is time, trains on them, and publishes what is no worse.

        The draft that serves and the trained one are judged on the same held-out samples of these steps. Returns what
        the step is to report, under names that begin with draft/; nothing where it did not train.
        """
        self._sort_captured(groups)
        if step % self.config.train_every or not self._fresh or not self._held_out:
            return {}
        size = self.config.sequences_per_update
        updates = [self.trainer.step(self._fresh[at : at + size]) for at in range(0, len(self._fresh), size)]
        served = self.served_unrolled.evaluate(self._held_out)
        trained = self.trainer.unrolled.evaluate(self._held_out)
        is_published = trained["tokens_per_step"] >= served["tokens_per_step"]
        if is_published:
            self._serve(step)
        self._fresh, self._held_out = [], []
        return {
            "draft/loss": sum(update["loss"] for update in updates) / len(updates),
            "draft/updates": len(updates),
            "draft/published": float(is_published),
            "draft/version": self.version,
            "draft/tokens_per_step_served": served["tokens_per_step"],
            **{f"draft/{name}": value for name, value in trained.items()},
        }

    def _sort_captured(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Captured states of the groups' samples become sequences; those of other requests are dropped."""
        prompt_lengths = {
            (*sample.prompt_ids, *sample.response_ids): len(sample.prompt_ids) for group in groups for sample in group
        }
        for captured in self.capture.take():
            tokens = tuple(captured.token_ids)
            num_prompt = prompt_lengths.get(tokens)
            if num_prompt is None or len(tokens) < max(3, num_prompt + 1):
                continue
            mask = [index >= num_prompt for index in range(len(tokens))]
            sequence = draft_sequence(captured, tokens, mask, self.hidden_size)
            # By content: the engine's order of ending must not decide.
            digest = int.from_bytes(hashlib.blake2b(repr(tokens).encode(), digest_size=8).digest(), "little")
            (self._held_out if digest % self.config.held_out_every == 0 else self._fresh).append(sequence)
        for sequences in (self._fresh, self._held_out):
            sequences.sort(key=lambda sequence: sequence.token_ids)

    @torch.no_grad()
    def _serve(self, version: int) -> None:
        served = dict(self.served.named_parameters())
        for name, weight in self.trainer.draft.named_parameters():
            served[name].copy_(weight)
        self.version = version
        if self.publish is not None:
            self.publish(self.trainer.named_weights(), version)

    def save(self, folder: str | Path) -> None:
        """Writes the trainer's state and the served draft into a new folder."""
        folder = Path(folder)
        folder.mkdir(parents=True)
        self.trainer.save(folder / "trainer")
        served = {name: parameter.detach().cpu().clone() for name, parameter in self.served.named_parameters()}
        save_file(served, folder / "served.safetensors", metadata={"version": str(self.version)})

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Goes on where `save` was called, and publishes the draft that was served then."""
        folder = Path(folder)
        self.trainer.load(folder / "trainer")
        with safe_open(folder / "served.safetensors", framework="pt") as file:
            for name, parameter in self.served.named_parameters():
                parameter.copy_(file.get_tensor(name))
            self.version = int(file.metadata()["version"])
        if self.publish is not None and self.version > 0:
            self.publish([*self.served.named_parameters(), ("token_map", self.served.token_map)], self.version)
