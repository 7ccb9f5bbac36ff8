"""The trainer: one model on Megatron-core, its optimizer, and their checkpoints.

What it is made of is in megatron/: trained_model (this rank's part of the model), scoring (log-probabilities and
values), step_gradients (forward and backward passes of a step), optimizer, hf_weights (import and export),
training_state (checkpoints) and reference_model.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lockstep.engine.fields.values import check_device_is_there
from lockstep.engine.models.config import Head
from lockstep.engine.request import SAMPLING_RULES
from lockstep.engine.weights.checksums import checksum
from lockstep.kernels import numerics
from lockstep.kernels.process_state import own_state
from lockstep.trainer_bridge.algorithms.losses import Loss
from lockstep.trainer_bridge.config import TrainerConfig
from lockstep.trainer_bridge.megatron import hf_weights
from lockstep.trainer_bridge.megatron.checkpoint import CheckpointFiles
from lockstep.trainer_bridge.megatron.layout import LocalParameter
from lockstep.trainer_bridge.megatron.model import LockstepGPTModel
from lockstep.trainer_bridge.megatron.optimizer import build_optimizer
from lockstep.trainer_bridge.megatron.reference_model import ReferenceModel, ReferenceWeights
from lockstep.trainer_bridge.megatron.scoring import checked_sequences, score
from lockstep.trainer_bridge.megatron.step_gradients import compute_gradients
from lockstep.trainer_bridge.megatron.trained_model import TrainedModel
from lockstep.trainer_bridge.megatron.training_state import TrainingState
from lockstep.trainer_bridge.packing import PackedBatch


class MegatronTrainer:
    """Trains one model. `step_count` is the number of updates made.

    `logprobs` of any tokens, and `values`, are bit for bit those of an engine with the same weights.

    Over several ranks, every rank makes the same calls with the same arguments, in the same order, and every rank gets
    the whole result; only `named_weights` and `local_layout` are of the rank itself, and send nothing.
    """

    def __init__(self, config: TrainerConfig):
        check_device_is_there("TrainerConfig.device", config.device)
        self.config = config
        self.device = numerics.usable_device(config.device)
        self.num_threads = torch.get_num_threads()  # with which the row contract is seen to be kept
        with own_state(self.device, builds=True, learns=True):
            self._build(config)

    def _build(self, config: TrainerConfig) -> None:
        self.model_config = hf_weights.trained_model_config(config)
        self.trained_model = TrainedModel(config, self.model_config, self.device)
        self.ranks, self.chunks = self.trained_model.ranks, self.trained_model.chunks
        hf_weights.import_weights(config, self.trained_model)
        self.optimizers = [build_optimizer(config, chunk, self.ranks.data) for chunk in self.chunks]
        self.step_count = 0
        self.num_weight_changes = 0  # by steps and loads, for those who share the weights
        self._reference = ReferenceModel(config.reference_model or config.model, self.trained_model)

    @property
    def model(self) -> LockstepGPTModel:
        """This rank's first model chunk; the only one without virtual pipeline stages."""
        return self.chunks[0]

    # Log-probabilities -----------------------------------------------------------------------------------------------

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float | None]]:
        """`[None, lp(t1 | t0), lp(t2 | t0 t1), ...]` per sequence, of log-softmax(logits / temperature).

        A temperature means the number that it holds, whatever its type, as in `SamplingParams`. Raises ValueError that
        names the temperature, or the sequence with an unknown token id, without a token, or longer than
        max_tokens_per_micro_batch or than the model's positions.
        """
        self._require_head("lm")
        return self._logprobs(sequences, temperature, None)

    def values(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The scalar head's value of each token, given those before it; a reward model's score is the last one.

        Raises ValueError as `logprobs` does, and for a model without a scalar head.
        """
        self._require_head("scalar")
        return self._score(sequences, 1.0, None)

    def reference_logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float | None]]:
        """`logprobs` of the reference model, whose weights are read at the first call and kept."""
        self._require_head("lm")
        return self._logprobs(sequences, temperature, self._reference.weights)

    def _logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float, weights: ReferenceWeights | None
    ) -> list[list[float | None]]:
        return [[None, *logprobs] for logprobs in self._score(sequences, temperature, weights)]

    def _score(
        self, sequences: Sequence[Sequence[int]], temperature: float, weights: ReferenceWeights | None
    ) -> list[list[float]]:
        """What the head gives for each sequence: its tokens' values, or the log-probs of all but the first."""
        temperature = SAMPLING_RULES["temperature"]("temperature", temperature)
        sequences = checked_sequences(self.trained_model, sequences)
        with own_state(self.device, self.num_threads), torch.no_grad():
            return score(self.trained_model, sequences, temperature, self.config.max_tokens_per_micro_batch, weights)

    def _require_head(self, head: Head) -> None:
        if self.config.head != head:
            lacking = "log-probabilities" if head == "lm" else "values"
            raise ValueError(f'the model has no {lacking}: TrainerConfig.head is "{self.config.head}", not "{head}"')

    # Training --------------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[PackedBatch], loss: Loss) -> dict[str, float]:
        """One update from all micro-batches of a step (see packing.pack).

        Returns loss, grad_norm (before clipping), learning_rate, tokens (forward), trained_tokens, entropy, and the
        stats of `loss`: weighted means, or maxima where the name ends in `_max`.
        Raises FloatingPointError that names the step for a non-finite loss or gradient. On any error the weights and
        the optimizer are as before.
        """
        with own_state(self.device, self.num_threads, learns=True):
            batches = [batch.for_autograd() for batch in batches]
            stats = compute_gradients(self.trained_model, self.optimizers, batches, loss, self.step_count)
            learning_rate = self.config.learning_rate_at(self.step_count)
            self.num_weight_changes += 1
            for optimizer in self.optimizers:
                optimizer.step(learning_rate, self.config.max_grad_norm, stats["grad_norm"])
            self.trained_model.refresh_tied_copy()
            self.step_count += 1
            return {
                **stats,
                "learning_rate": learning_rate,
                "tokens": sum(len(batch.token_ids) for batch in batches),
                "trained_tokens": sum(int(batch.weights.count_nonzero()) for batch in batches),
            }

    # Weights in and out ----------------------------------------------------------------------------------------------

    def local_layout(self) -> list[LocalParameter]:
        """Which part of which parameter this rank holds: what `named_weights` yields, in its order.

        The layout of any rank of a trainer is layout.local_layout(model_config, sizes, rank), with these two and the
        rank from this trainer's `model_config` and `ranks.sizes`.
        """
        return self.trained_model.layout

    @cached_property
    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        return [(parameter.name, self.trained_model.weight(parameter)) for parameter in self.local_layout()]

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Megatron name, tensor) of each parameter, or of this rank's part of it where there are several ranks.

        Names are those of the whole model; `local_layout` tells the part. The tensors are the live ones: the next step
        changes them.
        """
        return iter(self._weights)

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Megatron name, whole tensor) of each parameter, on every rank, one at a time; not to be written to.

        All ranks must take all of them.
        """
        return self.trained_model.whole_weights()

    def weights_hash(self) -> str:
        """`engine.weights.checksum` of all weights: equal to the checksum of an engine that serves them."""
        return checksum(self.whole_weights())

    def export_hf(self, path: str | Path) -> None:
        """Writes, on rank 0, a directory that transformers loads, with the tokenizer files of the first model."""
        hf_weights.export_hf(self.config, self.trained_model, path)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint of weights, optimizer and step (see checkpoint.py), whole or not at all.

        metadata: plain JSON values for the caller, given back by `load`. Raises FileExistsError where `path` is,
        ValueError without an optimizer.
        """
        self._state().save(path, self.step_count, metadata or {})

    def load(self, path: str | Path) -> dict[str, Any]:
        """Restores what `save` wrote, to the bit, and returns its metadata.

        Raises MissingFileError without a checkpoint, and ValueError for one of another model, dtype or format, or with
        damaged content or without an optimizer. After an error while tensors are read, the trainer holds a mixture:
        load another checkpoint.
        """
        state = self._state()
        with CheckpointFiles(path) as files:
            state.check(files)
            self.num_weight_changes += 1
            state.load(files)
        self.step_count = files.common["step_count"]
        return files.common["metadata"]

    def _state(self) -> TrainingState:
        if self.config.optimizer == "none":
            raise ValueError('a checkpoint holds the optimizer, and TrainerConfig.optimizer is "none"')
        return TrainingState(self.trained_model, self.optimizers)
