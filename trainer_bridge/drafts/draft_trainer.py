"""Trains an EAGLE-3 draft with training-time test: all unrolled steps together, see unrolled_draft.py."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from lockstep.engine.checkpoints.checkpoint import CheckpointError, opened_tensors
from lockstep.engine.files import whole_file
from lockstep.engine.models.eagle3 import Eagle3Draft
from lockstep.engine.weights.checksums import checksum
from lockstep.kernels.process_state import own_state
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig
from lockstep.trainer_bridge.drafts.draft_batch import DraftBatch, DraftSequence
from lockstep.trainer_bridge.drafts.draft_loss import LOSSES
from lockstep.trainer_bridge.drafts.unrolled_draft import Targets, UnrolledDraft, row_chunks
from lockstep.trainer_bridge.megatron.grad_norm import gradient_norm
from lockstep.trainer_bridge.megatron.optimizer import MasterAdamW


class DraftTrainer:
    """Trains `draft` in place (in bf16 with fp32 master weights), on its device; deterministic.

    head_weight [V, H]: the target's, which is read at every step and never changed. `step_count`: updates made.
    """

    def __init__(self, config: DraftTrainerConfig, draft: Eagle3Draft, head_weight: torch.Tensor):
        self.config = config
        self.draft = draft.requires_grad_(True)
        self.device = draft.token_map.device
        c = config
        self.unrolled = UnrolledDraft(draft, head_weight, c.num_steps, c.temperature, c.max_tokens_per_micro_batch)
        self.optimizer = MasterAdamW(draft.parameters(), config)
        self.step_count = 0

    # Training --------------------------------------------------------------------------------------------------------

    def step(self, sequences: Sequence[DraftSequence]) -> dict[str, float]:
        """One update. The loss of an unrolled step is the mean over its trained tokens; rows whose likeliest token the
        draft lacks count there as 0.

        Returns loss, loss_first (of step 0), grad_norm, learning_rate, covered (the share of trained tokens that the
        draft can draft), tokens, trained_tokens. Raises ValueError if nothing can be trained, and FloatingPointError
        for a non-finite loss or gradient; the weights are as before then.
        """
        with own_state(self.device, learns=True):
            return self._step(sequences)

    def _step(self, sequences: Sequence[DraftSequence]) -> dict[str, float]:
        batches = self.unrolled.pack(sequences)
        counts = [sum(len(batch.trained[step]) for batch in batches) for step in range(self.config.num_steps)]
        if not counts[0]:
            raise ValueError("no token of the draft's step is trained on")
        losses = torch.zeros(self.config.num_steps, dtype=torch.float32, device=self.device)
        covered = torch.zeros((), dtype=torch.float32, device=self.device)
        try:
            for batch in batches:
                targets = self.unrolled.targets(batch)
                covered += targets.covered.sum()
                batch_losses = self._losses(batch, targets, counts)
                torch.stack(batch_losses).sum().backward()
                losses += torch.stack(batch_losses).detach()
                self.optimizer.gradients.accumulate()
            self.optimizer.gradients.end_run()
            self.optimizer.reduce_gradients()
            grad_norm = gradient_norm([master.grad for master in self.optimizer.masters], None, self.device)
            loss = float(losses.sum())
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise FloatingPointError(
                    f"draft step {self.step_count}: loss {loss}, gradient norm {grad_norm}; no update made"
                )
        except BaseException:
            self.optimizer.zero_grad()
            raise
        learning_rate = self.config.learning_rate_at(self.step_count)
        self.optimizer.step(learning_rate, self.config.max_grad_norm, grad_norm)
        self.step_count += 1
        return {
            "loss": loss,
            "loss_first": float(losses[0]),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "covered": float(covered) / counts[0],
            "tokens": sum(len(batch.positions) for batch in batches),
            "trained_tokens": counts[0],
        }

    def _losses(self, batch: DraftBatch, targets: Targets, counts: Sequence[int]) -> list[torch.Tensor]:
        """Of each unrolled step: the weighted share of this batch."""
        losses = []
        for step, normed in enumerate(self.unrolled.steps(batch)):
            share = self.config.step_decay**step / max(1, counts[step])
            parts = [normed.new_zeros((), dtype=torch.float32)]
            for rows, numbers in row_chunks(batch, step):
                # The logits are made again in the backward pass; nothing is drawn there.
                options = {"use_reentrant": False, "preserve_rng_state": False}
                parts.append(checkpoint(self._chunk_loss, normed[rows], targets, numbers, **options))
            losses.append(share * torch.stack(parts).sum())
        return losses

    def _chunk_loss(self, normed: torch.Tensor, targets: Targets, numbers: torch.Tensor) -> torch.Tensor:
        losses = LOSSES[self.config.loss](*self.unrolled.log_probs(normed, targets, numbers))
        return losses.where(targets.covered[numbers], 0.0).sum()

    # Weights and checkpoints -----------------------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What `Engine.update_draft` takes: the live parameters, and the draft's vocabulary."""
        for name, parameter in self.draft.named_parameters():
            yield name, parameter.detach()
        yield "token_map", self.draft.token_map

    def weights_hash(self) -> str:
        return checksum((name, parameter.detach()) for name, parameter in self.draft.named_parameters())

    def _state(self) -> dict[str, torch.Tensor]:
        """The live tensors that a checkpoint holds."""
        state = {"token_map": self.draft.token_map}
        for index, (name, parameter) in enumerate(self.draft.named_parameters()):
            state[f"weight/{name}"] = parameter.detach()
            for kind in self.optimizer.state_names(index):
                state[f"{kind}/{name}"] = self.optimizer.state_tensor(index, kind).detach()
        return state

    def save(self, path: str | Path) -> None:
        """Writes the weights, the optimizer's state and step_count to one file, whole or not at all."""
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in self._state().items()}
        with whole_file(Path(path)) as file:
            save_file(tensors, file, metadata={"step_count": str(self.step_count)})

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Restores what `save` wrote, to the bit. Raises CheckpointError that names what does not fit."""
        state = self._state()
        with opened_tensors(Path(path).parent, Path(path).name) as file:
            held = set(file.keys())
            if held != state.keys():
                raise CheckpointError(f"{path}: only one side has {', '.join(sorted(held ^ state.keys()))}")
            for name, tensor in state.items():
                if tuple(file.get_slice(name).get_shape()) != tuple(tensor.shape):
                    raise CheckpointError(f"{path}: {name} is not of shape {list(tensor.shape)}")
            for name, tensor in state.items():
                tensor.copy_(file.get_tensor(name))
            step_count = (file.metadata() or {}).get("step_count", "")
            if not step_count.isdecimal():
                raise CheckpointError(f"{path} is damaged: it has no step_count")
            self.step_count = int(step_count)
        self.optimizer.set_num_steps(self.step_count)


def frequent_tokens(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` most frequent of the tokens counted in int64 [V], ascending ids; among equals the lower id."""
    if not 1 <= size <= len(counts):
        raise ValueError(f"a draft vocabulary of {size} tokens out of {len(counts)}")
    return counts.sort(descending=True, stable=True).indices[:size].sort().values
