"""A draft that learns during reinforcement learning, from the hidden states of the rollouts themselves.

    draft = open_draft_stage(config, engine, temperature)                         # before the first rollout
    draft.before_rollout(); ...; metrics = draft.after_rollout(groups, step)      # in each step of the loop
    draft.save(folder) / draft.load(folder)                                       # with the run's checkpoints

Which draft serves changes no token, so none of this can change what the run learns.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from lockstep.engine import Engine
from lockstep.engine.checkpoints.checkpoint import CheckpointError, opened_tensors
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.engine.checkpoints.draft_config import choose_engine
from lockstep.engine.models.eagle3 import Eagle3Draft
from lockstep.engine.steps.capture import CaptureConfig
from lockstep.recipes.drafts.config import DraftStageConfig
from lockstep.recipes.drafts.draft import draft_sequence
from lockstep.recipes.drafts.draft_judge import HeldOut, ngram_tokens_per_step, tokens_per_step
from lockstep.recipes.drafts.draft_speed import decode_speed
from lockstep.rollout.sample import Sample
from lockstep.trainer_bridge import MegatronTrainer
from lockstep.trainer_bridge.drafts.draft_batch import DraftSequence
from lockstep.trainer_bridge.drafts.draft_trainer import DraftTrainer
from lockstep.trainer_bridge.drafts.unrolled_draft import UnrolledDraft

# Gives an engine new draft weights, in place and with a version: Engine.update_draft.
Publish = Callable[[Iterable[tuple[str, torch.Tensor]], int], None]


class NoDraftStage:
    """A run without a draft."""

    def before_rollout(self) -> None:
        pass

    def after_rollout(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        return {}

    def finish(self, path: Path, trainer: MegatronTrainer, samples: Sequence[Sample]) -> dict[str, float]:
        return {}

    def save(self, folder: str | Path) -> None:
        pass

    def load(self, folder: str | Path) -> None:
        pass


class DraftStage:
    """engine: captures the states, and serves the draft of config.start. publish: gives an engine new drafts.

    A kill loses the states that were captured and not yet trained on, and with them nothing of the run's own results.
    """

    def __init__(self, config: DraftStageConfig, engine: Engine, publish: Publish):
        self.config = config
        self.engine = engine
        self.publish = publish
        # The one that learns; the one that serves; and an earlier one of these, kept to compare.
        self.draft, self.served, self.frozen = (self._read_draft() for _ in range(3))
        # Refused now, not at the end.
        choose_engine(config.export_for, self.draft.config.aux_layers, engine.model_config)
        self.trainer = DraftTrainer(config.trainer, self.draft, engine.model.head_weight)
        self.version = 0  # of the served draft: the step after which it was published
        self.frozen_version = 0
        memory_bytes = int(config.memory_gb * 2**30)
        self.capture = engine.start_capture(
            CaptureConfig(self.draft.config.aux_layers, config.capture_every, memory_bytes)
        )
        self._fresh: list[DraftSequence] = []
        self._held_out: list[HeldOut] = []
        self._stats_before = engine.stats()

    def _read_draft(self) -> Eagle3Draft:
        embedding = self.engine.model.embedding.word_embeddings.weight
        options = {
            "head_weight": self.engine.model.head_weight,
            "numbers_of": self.engine.config.draft_layer_ids,
        }
        return load_draft(self.config.start, self.engine.model_config, embedding, embedding.dtype, **options)

    # In each step of the loop ------------------------------------------------------------------------------------

    def before_rollout(self) -> None:
        """What the engine does until `after_rollout` is reported."""
        self._stats_before = self.engine.stats()

    def after_rollout(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """Takes the states of the groups' samples; when it is time, trains on them, and publishes what is no worse.

        To be called while the engine serves the weights that the samples are of. Returns what the step is to report,
        under names that begin with draft/.
        """
        metrics = self._verified()
        self._sort_captured(groups)
        if step % self.config.train_every or not self._fresh or not self._held_out:
            return metrics
        size, passes = self.config.sequences_per_update, self.config.passes
        parts = [self._fresh[at : at + size] for at in range(0, len(self._fresh), size)] * passes
        losses = [self.trainer.step(part)["loss"] for part in parts]
        metrics |= {"draft/loss": sum(losses) / len(losses), "draft/updates": len(losses)}
        metrics |= self._judge_and_publish(step)
        self._fresh, self._held_out = [], []
        return metrics

    def _verified(self) -> dict[str, float]:
        """What the engine's own verification made of the served draft in these rollouts."""
        now = self.engine.stats()
        since = {name: now[name] - before for name, before in self._stats_before.items()}
        if not since["verify_steps"]:
            return {}
        accepted = {
            f"draft/accepted_at_{place}": since[f"accepted_at_{place}"] / since[f"drafted_at_{place}"]
            for place in range(1, self.config.num_draft_tokens + 1)
            if since[f"drafted_at_{place}"]
        }
        mean = 1 + since["accepted_draft_tokens"] / since["verify_steps"]
        return {"draft/tokens_per_verify_step": mean, **accepted}

    def _sort_captured(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Captured states of the groups' samples become sequences; those of other requests are dropped."""
        samples = {(*sample.prompt_ids, *sample.response_ids): sample for group in groups for sample in group}
        for captured in self.capture.take():
            tokens = tuple(captured.token_ids)
            sample = samples.get(tokens)
            if sample is None or len(tokens) < max(3, len(sample.prompt_ids) + 2):
                continue
            num_prompt = len(sample.prompt_ids)
            mask = [index >= num_prompt for index in range(len(tokens))]
            sequence = draft_sequence(captured, tokens, mask, self.engine.model_config.hidden_size)
            # By content: the engine's order of ending must not decide.
            digest = int.from_bytes(hashlib.blake2b(repr(tokens).encode(), digest_size=8).digest(), "little")
            if digest % self.config.held_out_every == 0:
                self._held_out.append(HeldOut(sequence, num_prompt, sample.seed))
            else:
                self._fresh.append(sequence)
        self._fresh.sort(key=lambda sequence: sequence.token_ids)
        self._held_out.sort(key=lambda sample: sample.sequence.token_ids)

    def _judge_and_publish(self, step: int) -> dict[str, float]:
        """All drafts on the same held-out samples, by the engine's rule; the learned one serves if it is no worse."""
        learned, served, frozen = (self._judged(draft) for draft in (self.draft, self.served, self.frozen))
        is_published = learned >= served
        if is_published:
            _copy(self.draft, self.served)
            self.version = step
            self.publish(self.trainer.named_weights(), step)
            if not self.frozen_version and step >= self.config.freeze_at:
                _copy(self.draft, self.frozen)
                self.frozen_version = step
        expected = self.trainer.unrolled.evaluate([sample.sequence for sample in self._held_out])
        return {
            "draft/published": float(is_published),
            "draft/version": self.version,
            "draft/held_out_learned": learned,
            "draft/held_out_served": served,
            **({"draft/held_out_frozen": frozen} if 0 < self.frozen_version < step else {}),
            "draft/held_out_ngram": ngram_tokens_per_step(self._held_out, self.config.num_draft_tokens),
            "draft/held_out_expected": _expected(expected, self.config.num_draft_tokens),
        }

    def _judged(self, draft: Eagle3Draft) -> float:
        c, head_weight = self.config.trainer, self.engine.model.head_weight
        unrolled = UnrolledDraft(
            draft, head_weight, self.config.num_draft_tokens, c.temperature, c.max_tokens_per_micro_batch
        )
        return tokens_per_step(unrolled, self._held_out, self.config.num_draft_tokens)

    # Directories -------------------------------------------------------------------------------------------------

    def finish(self, path: Path, trainer: MegatronTrainer, samples: Sequence[Sample]) -> dict[str, float]:
        """Writes the draft that serves as a draft directory, where one may be, and times it on some of the samples.

        The run's engine is put to sleep: the timed ones need its memory.
        """
        shutil.rmtree(path, ignore_errors=True)
        save_draft(path, self.served, export_for=self.config.export_for, target=self.engine.model_config)
        self.engine.sleep()
        temperature = self.config.trainer.temperature
        return decode_speed(self.engine.config, path, trainer, samples[: self.config.speed_samples], temperature)

    def save(self, folder: str | Path) -> None:
        """Writes the trainer's state and the other drafts into a new folder."""
        folder = Path(folder)
        folder.mkdir(parents=True)
        self.trainer.save(folder / "trainer")
        tensors = {name: parameter.detach().cpu().clone() for name, parameter in self._kept()}
        versions = {"version": str(self.version), "frozen_version": str(self.frozen_version)}
        save_file(tensors, folder / "drafts.safetensors", metadata=versions)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Goes on where `save` was called, and publishes the draft that was served then.

        A checkpoint of a part of the run that trained no draft, on another cluster, has none: then with the first one.
        """
        folder = Path(folder)
        if not folder.exists():
            return
        self.trainer.load(folder / "trainer")
        with opened_tensors(folder, "drafts.safetensors") as file:
            kept, versions = dict(self._kept()), file.metadata() or {}
            if set(file.keys()) != kept.keys() or not versions.keys() >= {"version", "frozen_version"}:
                raise CheckpointError(f"{folder / 'drafts.safetensors'} does not hold this run's drafts")
            for name, parameter in kept.items():
                parameter.copy_(file.get_tensor(name))
            self.version, self.frozen_version = (int(versions[key]) for key in ("version", "frozen_version"))
        if self.version > 0:
            self.publish([*self.served.named_parameters(), ("token_map", self.served.token_map)], self.version)

    def _kept(self) -> list[tuple[str, torch.Tensor]]:
        drafts = {"served": self.served, "frozen": self.frozen}
        return [(f"{kind}/{name}", p) for kind, draft in drafts.items() for name, p in draft.named_parameters()]


def open_draft_stage(config: DraftStageConfig, engine: Engine, temperature: float) -> DraftStage | NoDraftStage:
    """temperature: of the rollouts."""
    if not config.is_on:
        return NoDraftStage()
    trained = replace(config, trainer=replace(config.trainer, temperature=temperature))
    return DraftStage(trained, engine, engine.update_draft)


def _expected(evaluated: dict[str, float], num_draft_tokens: int) -> float:
    """Tokens per step by the formula, of chains of so many."""
    expected, reached = 1.0, 1.0
    for place in range(num_draft_tokens):
        reached *= evaluated[f"acceptance_{place}"]
        expected += reached
    return expected


@torch.no_grad()
def _copy(source: Eagle3Draft, target: Eagle3Draft) -> None:
    targets = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        targets[name].copy_(parameter)
