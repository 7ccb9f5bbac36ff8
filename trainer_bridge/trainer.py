"""The trainer: one model on Megatron-core, its optimizer, and their checkpoints."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lockstep.engine.checkpoint import initialize_dummy, iterate_weights, save_hf
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.names import head_matrix_shapes, matrix_shapes
from lockstep.engine.transfer import to_device
from lockstep.engine.weights import checksum
from lockstep.kernels import numerics
from lockstep.trainer_bridge.checkpoint import load_tensors, read_common, save_checkpoint
from lockstep.trainer_bridge.losses import Loss
from lockstep.trainer_bridge.megatron_setup import initialize_megatron
from lockstep.trainer_bridge.model import LockstepGPTModel
from lockstep.trainer_bridge.optimizer import LrSchedule, MasterAdamW, NoOptimizer, learning_rate
from lockstep.trainer_bridge.packing import PackedBatch, first_fit, sequence_layout


@dataclass(frozen=True)
class TrainerConfig:
    """What is trained, and how.

    model: an HF directory (config.json, safetensors).
    device, dtype: "cpu" with "float32", or "cuda" with "bfloat16" (with fp32 master weights) or "float32".
    load_format: "auto" reads the directory's weights; "dummy" makes random ones from `seed`.
    reference_model: HF directory of the KL penalty's reference; None is `model`. Read when first asked for.
    optimizer: "adamw"; or "none", which keeps no optimizer state: `step` computes losses and gradients and changes
        nothing, `save` and `load` refuse.
    lr_schedule: after warmup_steps, constant at learning_rate, or falling to min_learning_rate at step total_steps.
    max_grad_norm: gradients of a larger 2-norm are scaled down to it; None leaves them.
    max_tokens_per_micro_batch: tokens of one forward pass in `logprobs`, and what callers give to `pack`.
    recompute: keep each layer's input only, and compute its activations again in the backward pass.
    """

    model: str
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_format: Literal["auto", "dummy"] = "auto"
    seed: int = 0
    reference_model: str | None = None
    optimizer: Literal["adamw", "none"] = "adamw"
    learning_rate: float = 1e-6
    min_learning_rate: float = 0.0
    lr_schedule: LrSchedule = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    max_tokens_per_micro_batch: int = 8192
    recompute: bool = False

    def __post_init__(self):
        for field, known in (
            ("dtype", ("float32", "bfloat16")),
            ("load_format", ("auto", "dummy")),
            ("optimizer", ("adamw", "none")),
            ("lr_schedule", ("constant", "linear", "cosine")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"TrainerConfig.{field} must be one of {known}, got {getattr(self, field)!r}")
        if self.device.startswith("cpu") and self.dtype != "float32":
            raise ValueError(f"on the CPU the trainer equals the engine in float32 only, got dtype={self.dtype!r}")
        if self.lr_schedule != "constant" and self.total_steps is None:
            raise ValueError(f"TrainerConfig.lr_schedule={self.lr_schedule!r} needs total_steps")
        if self.max_tokens_per_micro_batch < 1:
            raise ValueError(f"TrainerConfig.max_tokens_per_micro_batch is {self.max_tokens_per_micro_batch}")


class MegatronTrainer:
    """Trains one model. `step_count` is the number of updates made.

    `logprobs` of any tokens are bit for bit those of an engine with the same weights.
    """

    def __init__(self, config: TrainerConfig):
        self.config = config
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        numerics.set_up(self.device)
        initialize_megatron(self.device)
        self.model_config = load_model_config(config.model)
        shapes, head_shapes = matrix_shapes(self.model_config), head_matrix_shapes(self.model_config)
        numerics.check_row_contract(self.device, self.dtype, shapes, head_shapes)
        self.model = LockstepGPTModel(self.model_config, self.device, self.dtype, config.recompute)
        if config.load_format == "dummy":
            initialize_dummy(self.model, config.seed)
        else:
            self._import_hf(config.model)
        self.optimizer = self._build_optimizer()
        self.step_count = 0
        self._reference_weights: dict[str, torch.Tensor] | None = None

    def _build_optimizer(self) -> MasterAdamW | NoOptimizer:
        c, parameters = self.config, self.model.parameters()
        if c.optimizer == "none":
            return NoOptimizer(parameters)
        return MasterAdamW(parameters, (c.adam_beta1, c.adam_beta2), c.adam_epsilon, c.weight_decay)

    # Log-probabilities -----------------------------------------------------------------------------------------------

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float | None]]:
        """`[None, lp(t1 | t0), lp(t2 | t0 t1), ...]` per sequence, of log-softmax(logits / temperature).

        Raises ValueError for an unknown token id, an empty sequence, or one that is longer than
        max_tokens_per_micro_batch or than the model's positions.
        """
        return self._score(sequences, temperature, None)

    def reference_logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float | None]]:
        """`logprobs` of the reference model, whose weights are read at the first call and kept."""
        if self._reference_weights is None:
            path = self.config.reference_model or self.config.model
            if (reference_config := load_model_config(path)) != self.model_config:
                raise ValueError(f"reference model {path} is {reference_config}, the trained one {self.model_config}")
            self._reference_weights = {
                name: tensor.to(self.device, copy=True)
                for name, tensor in iterate_weights(path, self.model_config, self.dtype)
            }
        return self._score(sequences, temperature, self._reference_weights)

    @torch.no_grad()
    def _score(
        self, sequences: Sequence[Sequence[int]], temperature: float, weights: dict[str, torch.Tensor] | None
    ) -> list[list[float | None]]:
        scores: list[list[float | None]] = [[] for _ in sequences]
        for members in first_fit([len(s) for s in sequences], self.config.max_tokens_per_micro_batch):
            token_ids = torch.tensor([token for i in members for token in sequences[i]])
            positions, cu_seqlens = sequence_layout([len(sequences[i]) for i in members])
            self._check_tokens(token_ids, positions)
            # The row before each token that is not the first of its sequence predicts it.
            rows = (positions > 0).nonzero().squeeze(1) - 1
            tensors = (token_ids, positions, cu_seqlens, rows, token_ids[rows + 1])
            inputs = [to_device(tensor, self.device) for tensor in tensors]
            call = (*inputs, temperature)
            if weights is None:
                values, _ = self.model(*call)
            else:
                values, _ = torch.func.functional_call(self.model, weights, call)
            per_sequence = values.cpu().split([len(sequences[i]) - 1 for i in members])
            for i, sequence_values in zip(members, per_sequence, strict=True):
                scores[i] = [None, *sequence_values.tolist()]
        return scores

    def _check_tokens(self, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= self.model_config.vocab_size:
            unknown = lowest if lowest < 0 else highest
            raise ValueError(f"token id {unknown} is not in the vocabulary of {self.model_config.vocab_size}")
        longest = int(positions.max()) + 1
        if longest > self.model_config.max_position_embeddings:
            raise ValueError(
                f"a sequence has {longest} tokens, the model has {self.model_config.max_position_embeddings} positions"
            )

    # Training --------------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[PackedBatch], loss: Loss) -> dict[str, float]:
        """One update from all micro-batches of a step, whose weights sum to 1 (see packing.pack).

        Returns loss, grad_norm (before clipping), lr, tokens (forward), trained_tokens, entropy, and the stats of
        `loss`: weighted means, or maxima where the name ends in `_max`.
        Raises FloatingPointError that names the step for a non-finite loss or gradient. On any error the weights and
        the optimizer are as before.
        """
        sums: dict[str, torch.Tensor] = {}
        tokens = trained_tokens = 0
        try:
            for batch in batches:
                tokens += len(batch.token_ids)
                trained_tokens += int(batch.weights.count_nonzero())
                self._check_tokens(batch.token_ids, batch.positions)
                for name, value in self._backward(batch, loss).items():
                    combine = torch.maximum if name.endswith("_max") else torch.add
                    sums[name] = combine(sums[name], value) if name in sums else value
                self.optimizer.accumulate()
            if trained_tokens == 0:
                raise ValueError(f"step {self.step_count}: no token of the step is trained on")
            grad_norm = self.optimizer.grad_norm()
            stats = {name: value.item() for name, value in sums.items()} | {"grad_norm": grad_norm.item()}
            if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
                raise FloatingPointError(
                    f"step {self.step_count}: loss {stats['loss']}, gradient norm {stats['grad_norm']}; no update made"
                )
        except BaseException:
            self.optimizer.zero_grad()
            raise
        lr = self._learning_rate()
        self.optimizer.step(lr, self.config.max_grad_norm, grad_norm)
        self.step_count += 1
        return {**stats, "lr": lr, "tokens": tokens, "trained_tokens": trained_tokens}

    def _backward(self, batch: PackedBatch, loss: Loss) -> dict[str, torch.Tensor]:
        """Adds a micro-batch's gradients. Returns its part of the loss and of the stats, as scalars on the device."""
        rows = to_device(batch.weights.nonzero().squeeze(1), self.device)
        batch = batch.to(self.device)
        if len(rows) == 0:
            return {}
        trained, entropy = self.model(
            batch.token_ids, batch.positions, batch.cu_seqlens, rows, batch.targets[rows], batch.temperature
        )
        logprobs = torch.zeros_like(batch.weights).index_copy(0, rows, trained)
        per_token_loss, stats = loss(logprobs, batch)
        total = (per_token_loss * batch.weights).sum()
        total.backward()
        with torch.no_grad():
            parts = {"loss": total.detach(), "entropy": (entropy * batch.weights[rows]).sum()}
            for name, values in stats.items():
                parts[name] = values[rows].max() if name.endswith("_max") else (values * batch.weights).sum()
        return parts

    def _learning_rate(self) -> float:
        c = self.config
        return learning_rate(
            self.step_count, c.learning_rate, c.min_learning_rate, c.lr_schedule, c.warmup_steps, c.total_steps
        )

    # Weights in and out ----------------------------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Megatron name, tensor) of each parameter. The tensors are the live ones: the next step changes them."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def weights_hash(self) -> str:
        """`engine.weights.checksum` of all weights: equal to the checksum of an engine that serves them."""
        return checksum(self.named_weights())

    def export_hf(self, path: str | Path) -> None:
        """Writes a directory that transformers loads, with the tokenizer files of the model trained from."""
        source = Path(self.config.model)
        source_config = json.loads((source / "config.json").read_text())
        save_hf(path, source_config, self.named_weights(), self.model_config, source_dir=source)

    @torch.no_grad()
    def _import_hf(self, path: str) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in iterate_weights(path, self.model_config):
            parameters[name].copy_(tensor)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Writes a Megatron distributed checkpoint of weights, optimizer and step, whole or not at all.

        metadata: plain values for the caller, given back by `load`. Raises FileExistsError where `path` is, ValueError
        without an optimizer.
        """
        self._require_optimizer()
        common = {
            "model": asdict(self.model_config),
            "dtype": self.config.dtype,
            "step_count": self.step_count,
            "state_hash": self._state_hash(),
            "metadata": metadata or {},
        }
        save_checkpoint(path, self._sharded_state(), common)

    @torch.no_grad()
    def load(self, path: str | Path) -> dict[str, Any]:
        """Restores what `save` wrote, to the bit, and returns its metadata.

        Raises FileNotFoundError without a checkpoint, and ValueError for one of another model, dtype, or with damaged
        content or without an optimizer. After an error while tensors are read, the trainer holds a mixture: load
        another checkpoint.
        """
        self._require_optimizer()
        common = read_common(path)
        for name, present in (("model", asdict(self.model_config)), ("dtype", self.config.dtype)):
            if common[name] != present:
                raise ValueError(f"checkpoint {path} has {name} {common[name]}, the trainer {present}")
        loaded = load_tensors(path, self._sharded_state())
        for name, parameter in self.model.named_parameters():
            parameter.copy_(loaded["weights"][name])
        for index in range(len(self.optimizer.parameters)):
            for name, tensor in self.optimizer.state_tensors(index).items():
                tensor.copy_(loaded["optimizer"][str(index)][name])
        self.optimizer.zero_grad()
        self.optimizer.set_num_steps(common["step_count"])
        self.step_count = common["step_count"]
        if self._state_hash() != common["state_hash"]:
            raise ValueError(f"checkpoint {path} is damaged: its tensors do not have the hash that was saved with them")
        return common["metadata"]

    def _require_optimizer(self) -> None:
        if self.config.optimizer == "none":
            raise ValueError('a checkpoint holds the optimizer, and TrainerConfig.optimizer is "none"')

    def _sharded_state(self) -> dict[str, Any]:
        weights = self.model.sharded_state_dict()
        return {"weights": weights, "optimizer": self.optimizer.sharded_state_dict(weights)}

    def _state_hash(self) -> str:
        names = [name for name, _ in self.model.named_parameters()]
        optimizer_state = [
            (f"{name}/{state}", tensor)
            for index, name in enumerate(names)
            for state, tensor in self.optimizer.state_tensors(index).items()
        ]
        return checksum([*self.named_weights(), *optimizer_state])
