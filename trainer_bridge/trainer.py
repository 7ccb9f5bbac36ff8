"""The trainer: one model on Megatron-core, its optimizer, and their checkpoints."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.engine.checkpoints.checkpoint import check_weights, iterate_weights
from lockstep.engine.checkpoints.export import save_hf
from lockstep.engine.checks import (
    check_device_is_there,
    list_of_sequences,
    sequence_ids,
)
from lockstep.engine.models.config import Head, ModelConfig, as_scalar_model, load_model_config, read_config_json
from lockstep.engine.models.layers.linear import format_named
from lockstep.engine.models.names import head_matrix_shapes
from lockstep.engine.models.sharding import ParameterShard, product_shapes
from lockstep.engine.request import SAMPLING_RULES
from lockstep.engine.weights.checksums import checksum
from lockstep.engine.weights.dummy_weights import fill_dummy
from lockstep.kernels import numerics
from lockstep.kernels.process_state import own_state
from lockstep.trainer_bridge.algorithms.losses import Loss
from lockstep.trainer_bridge.config import TrainerConfig
from lockstep.trainer_bridge.megatron.checkpoint import CheckpointFiles, named_shard, save_checkpoint
from lockstep.trainer_bridge.megatron.grad_norm import gradient_norm
from lockstep.trainer_bridge.megatron.layout import (
    LocalParameter,
    check_sizes,
    local_layout,
    local_parts,
    shard_of,
    whole_tensors,
)
from lockstep.trainer_bridge.megatron.megatron_setup import initialize_megatron
from lockstep.trainer_bridge.megatron.model import LockstepGPTModel
from lockstep.trainer_bridge.megatron.optimizer import MasterAdamW, NoOptimizer
from lockstep.trainer_bridge.megatron.packing import PackedBatch, deal, first_fit, sequence_layout
from lockstep.trainer_bridge.megatron.parallel import Ranks, exchange
from lockstep.trainer_bridge.megatron.passes import MicroBatch, ScoringPasses, TrainingPasses, fold_stats, to_floats

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


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
        self.dtype = getattr(torch, config.dtype)
        self.model_config = self._model_config()
        self.ranks = self._join_ranks()
        numerics.set_up(self.device)
        sizes = self.ranks.sizes
        linear_format = format_named(config.linear_format, "TrainerConfig.linear_format", sizes.tensor)
        shapes = product_shapes(self.model_config, shard_of(sizes, self.ranks.tensor.rank), sizes.row_parallel_splits)
        numerics.check_row_contract(self.device, self.dtype, shapes, head_matrix_shapes(self.model_config))
        if config.head == "scalar":
            numerics.check_row_contract(self.device, torch.float32, {(1, self.model_config.hidden_size)})
        self.chunks = [
            LockstepGPTModel(
                self.model_config, self.device, self.dtype, self.ranks, chunk, config.recompute, linear_format
            )
            for chunk in range(config.virtual_pipeline_parallel_size)
        ]
        self._parameters = {
            parameter.name: self.chunks[parameter.chunk].get_parameter(parameter.module_name)
            for parameter in self.local_layout()
        }
        self._import_weights()
        self.optimizers = [self._build_optimizer(chunk) for chunk in self.chunks]
        self._optimizer_index = {
            name: index
            for name, parameter in self._parameters.items()
            for optimizer in self.optimizers
            for index, other in enumerate(optimizer.parameters)
            if other is parameter
        }
        self.step_count = 0
        self.num_weight_changes = 0  # by steps and loads, for those who share the weights
        self._reference_weights: list[dict[str, torch.Tensor]] | None = None

    @property
    def model(self) -> LockstepGPTModel:
        """This rank's first model chunk; the only one without virtual pipeline stages."""
        return self.chunks[0]

    def _model_config(self) -> ModelConfig:
        held = load_model_config(self.config.model)
        if self.config.load_format == "auto":
            check_weights(self.config.model, held)
        if self.config.head == "scalar":
            return held.with_scalar_head()
        if held.head == "scalar":
            raise ValueError(f'{self.config.model} has a scalar head: TrainerConfig.head must be "scalar"')
        return held

    def _join_ranks(self) -> Ranks:
        c = self.config
        initialize_megatron(self.device, c.tensor_parallel_size, c.pipeline_parallel_size, c.rank_timeout_s)
        sizes = c.parallel_sizes(dist.get_world_size())
        check_sizes(sizes, self.model_config)
        return Ranks.of_this_process(sizes)

    def _build_optimizer(self, chunk: LockstepGPTModel) -> MasterAdamW | NoOptimizer:
        parameters = [parameter for parameter in chunk.parameters() if parameter is not chunk.tied_copy]
        if self.config.optimizer == "none":
            return NoOptimizer(parameters)
        return MasterAdamW(parameters, self.config, self.ranks.data)

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
        if self._reference_weights is None:
            path = self.config.reference_model or self.config.model
            if (reference_config := load_model_config(path)) != self.model_config:
                raise ValueError(f"reference model {path} is {reference_config}, the trained one {self.model_config}")
            self._reference_weights = self._read_reference(path)
        return self._logprobs(sequences, temperature, self._reference_weights)

    def _logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float, weights: list[dict[str, torch.Tensor]] | None
    ) -> list[list[float | None]]:
        return [[None, *logprobs] for logprobs in self._score(sequences, temperature, weights)]

    def _require_head(self, head: Head) -> None:
        if self.config.head != head:
            lacking = "log-probabilities" if head == "lm" else "values"
            raise ValueError(f'the model has no {lacking}: TrainerConfig.head is "{self.config.head}", not "{head}"')

    def _score(
        self, sequences: Sequence[Sequence[int]], temperature: float, weights: list[dict[str, torch.Tensor]] | None
    ) -> list[list[float]]:
        """What the head gives for each sequence: its tokens' values, or the log-probs of all but the first."""
        temperature = SAMPLING_RULES["temperature"]("temperature", temperature)
        sequences = [self._checked(i, ids) for i, ids in enumerate(list_of_sequences("sequences", sequences))]
        with own_state(self.device, self.num_threads), torch.no_grad():
            return self._scores(sequences, temperature, weights)

    def _scores(
        self, sequences: Sequence[Sequence[int]], temperature: float, weights: list[dict[str, torch.Tensor]] | None
    ) -> list[list[float]]:
        bins = first_fit([len(s) for s in sequences], self.config.max_tokens_per_micro_batch)
        micro_batches = [self._scoring_batch([sequences[i] for i in members], temperature) for members in bins]
        shares = deal(len(bins), self.ranks.sizes.data)
        own = micro_batches[shares[self.ranks.data.rank]]
        passes = ScoringPasses(self.chunks, self.ranks, own, self.device, weights=weights)
        passes.run(forward_only=True)
        own_values = [passes.values[m] for m in range(len(own))] if self.chunks[-1].post_process else None
        # All ranks know how many rows each micro-batch has.
        sizes = [sum(len(batch.rows) for batch in micro_batches[share]) for share in shares]
        values = self._share_values(own_values, sizes).cpu()
        scores: list[list[float]] = [[] for _ in sequences]
        order = [i for members in bins for i in members]
        not_scored = 1 if self.config.head == "lm" else 0
        per_sequence = values.split([len(sequences[i]) - not_scored for i in order]) if order else ()
        for i, sequence_values in zip(order, per_sequence, strict=True):
            scores[i] = sequence_values.tolist()
        return scores

    def _scoring_batch(self, sequences: Sequence[Sequence[int]], temperature: float) -> MicroBatch:
        token_ids = torch.tensor(
            [token for sequence in sequences for token in sequence], dtype=torch.int64, device="cpu"
        )
        positions, cu_seqlens = sequence_layout([len(sequence) for sequence in sequences])
        if self.config.head == "scalar":
            rows = torch.arange(len(token_ids), dtype=torch.int64, device="cpu")
            return MicroBatch(token_ids, positions, cu_seqlens, rows, token_ids, temperature)
        # The row before each token that is not the first of its sequence predicts it.
        rows = (positions > 0).nonzero().squeeze(1) - 1
        return MicroBatch(token_ids, positions, cu_seqlens, rows, token_ids[rows + 1], temperature)

    def _checked(self, index: int, sequence: Sequence[int]) -> list[int]:
        """Raises ValueError for what `engine.score` would refuse too."""
        try:
            ids = sequence_ids(sequence, self.model_config.vocab_size)
            self._check_length(len(ids))
        except ValueError as error:
            raise ValueError(f"sequence {index}: {error}") from None
        return ids

    def _share_values(self, own: list[torch.Tensor] | None, sizes: Sequence[int]) -> torch.Tensor:
        """The values of all data-parallel ranks, of so many each, from the last stage's to every rank."""
        values = torch.empty(sum(sizes), dtype=torch.float32, device=self.device)
        parts, data, stages = values.split(list(sizes)), self.ranks.data, self.ranks.pipeline
        if own:
            torch.cat(own, out=parts[data.rank])
        if stages.group is not None and sizes[data.rank]:
            dist.broadcast(parts[data.rank], stages.global_rank(stages.size - 1), stages.group)
        if data.group is not None:
            for rank, part in enumerate(parts):
                if sizes[rank]:
                    dist.broadcast(part, data.global_rank(rank), data.group)
        return values

    def _check_tokens(self, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= self.model_config.vocab_size:
            unknown = lowest if lowest < 0 else highest
            raise ValueError(f"token id {unknown} is outside the vocabulary of {self.model_config.vocab_size}")
        self._check_length(int(positions.max()) + 1)

    def _check_length(self, num_tokens: int) -> None:
        limit = self.model_config.max_position_embeddings
        if num_tokens > limit:
            raise ValueError(f"a sequence has {num_tokens} tokens, the model has {limit} positions")

    # Training --------------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[PackedBatch], loss: Loss) -> dict[str, float]:
        """One update from all micro-batches of a step (see packing.pack).

        Returns loss, grad_norm (before clipping), learning_rate, tokens (forward), trained_tokens, entropy, and the
        stats of `loss`: weighted means, or maxima where the name ends in `_max`.
        Raises FloatingPointError that names the step for a non-finite loss or gradient. On any error the weights and
        the optimizer are as before.
        """
        with own_state(self.device, self.num_threads, learns=True):
            return self._step([batch.for_autograd() for batch in batches], loss)

    def _step(self, batches: Sequence[PackedBatch], loss: Loss) -> dict[str, float]:
        for batch in batches:
            self._check_tokens(batch.token_ids, batch.positions)
        trained_tokens = sum(int(batch.weights.count_nonzero()) for batch in batches)
        if trained_tokens == 0:
            raise ValueError(f"step {self.step_count}: no token of the step is trained on")
        try:
            total_weight = sum(batch.weights.double().sum().item() for batch in batches)
            stats = fold_stats(self._backward([batch for batch in batches if batch.weights.any()], loss), total_weight)
            for optimizer in self.optimizers:
                optimizer.reduce_gradients()
            stats["grad_norm"] = self._grad_norm()
            if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
                raise FloatingPointError(
                    f"step {self.step_count}: loss {stats['loss']}, gradient norm {stats['grad_norm']}; no update made"
                )
        except BaseException:
            for chunk, optimizer in zip(self.chunks, self.optimizers, strict=True):
                chunk.zero_grad()
                optimizer.zero_grad()
            raise
        learning_rate = self.config.learning_rate_at(self.step_count)
        self.num_weight_changes += 1
        for optimizer in self.optimizers:
            optimizer.step(learning_rate, self.config.max_grad_norm, stats["grad_norm"])
        self._refresh_tied_copy()
        self.step_count += 1
        tokens = sum(len(batch.token_ids) for batch in batches)
        return {**stats, "learning_rate": learning_rate, "tokens": tokens, "trained_tokens": trained_tokens}

    def _backward(self, batches: Sequence[PackedBatch], loss: Loss) -> list[dict[str, float]]:
        """Sums the gradients of this rank's share of the batches, each of which has a trained token.

        Returns, on every rank, each batch's part of the loss and of the stats.
        """
        data, runs = self.ranks.data, deal(len(batches), self.ranks.sizes.gradient_splits)
        runs_per_rank = len(runs) // data.size
        own_runs = runs[data.rank * runs_per_rank : (data.rank + 1) * runs_per_rank]
        own = range(own_runs[0].start, own_runs[-1].stop)
        passes = TrainingPasses(
            self.chunks,
            self.ranks,
            [MicroBatch.of(batches[m]) for m in own],
            self.device,
            batches=[batches[m] for m in own],
            loss=loss,
            sums=[optimizer.gradients for optimizer in self.optimizers],
            run_of=[number for number, run in enumerate(own_runs) for _ in range(run.start, run.stop)],
        )
        passes.run(forward_only=False)
        passes.end_runs(runs_per_rank)
        parts = {own[m]: values for m, values in to_floats(passes.parts).items()} if self.ranks.tensor.rank == 0 else {}
        gathered = exchange(list(parts.items()), self.ranks.world, self.device)
        return [values for _, values in sorted(item for items in gathered for item in items)]

    def _grad_norm(self) -> float:
        """Of all gradients; one that all tensor-parallel ranks hold is counted once."""
        if self.config.optimizer == "none":
            return 0.0
        counted = []
        for parameter in self.local_layout():
            if parameter.shard.is_split or self.ranks.tensor.rank == 0:
                optimizer, index = self._optimizer_place(parameter)
                counted.append(optimizer.masters[index].grad)
        return gradient_norm(counted, self.ranks.world, self.device)

    def _optimizer_place(self, parameter: LocalParameter) -> tuple[MasterAdamW, int]:
        """The optimizer of a parameter, and its number there."""
        return self.optimizers[parameter.chunk], self._optimizer_index[parameter.name]

    # Weights in and out ----------------------------------------------------------------------------------------------

    def local_layout(self) -> list[LocalParameter]:
        """Which part of which parameter this rank holds: what `named_weights` yields, in its order.

        The layout of any rank of a trainer is layout.local_layout(model_config, sizes, rank), with these two and the
        rank from this trainer's `model_config` and `ranks.sizes`.
        """
        return self._layout

    @cached_property
    def _layout(self) -> list[LocalParameter]:
        return local_layout(self.model_config, self.ranks.sizes, dist.get_rank())

    @cached_property
    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        return [(parameter.name, self._parameters[parameter.name].detach()) for parameter in self._layout]

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
        yield from whole_tensors(
            self.model_config, self.ranks, lambda p: self._parameters[p.name].detach(), self.dtype, self.device
        )

    def weights_hash(self) -> str:
        """`engine.weights.checksum` of all weights: equal to the checksum of an engine that serves them."""
        return checksum(self.whole_weights())

    def export_hf(self, path: str | Path) -> None:
        """Writes, on rank 0, a directory that transformers loads, with the tokenizer files of the first model."""
        if dist.get_rank() == 0:
            source = Path(self.config.model)
            source_config = read_config_json(source)
            if self.config.head == "scalar":
                source_config = as_scalar_model(source_config)
            save_hf(path, source_config, self.whole_weights(), self.model_config, source_dir=source)
        else:
            for _ in self.whole_weights():
                pass
        if self.ranks.world is not None:
            dist.barrier()

    @torch.no_grad()
    def _import_weights(self) -> None:
        config = self.config
        if config.load_format == "dummy":
            whole = self._dummy_weights()
        else:
            held = load_model_config(config.model)
            whole = iterate_weights(config.model, held)
            if held.head != self.model_config.head:
                whole = self._with_new_head(whole)
        for parameter, part in local_parts(self.local_layout(), whole):
            self._parameters[parameter.name].copy_(part)
        self._refresh_tied_copy()

    def _with_new_head(self, whole: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, tensor) for name, tensor in whole if name != _HEAD)
        yield _HEAD, torch.zeros(1, self.model_config.hidden_size, dtype=torch.float32, device="cpu")

    def _dummy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for parameter in self.local_layout():
            dtype = self._parameters[parameter.name].dtype  # not always the trainer's: see the router's bias
            whole = torch.empty(parameter.shard.whole_shape, dtype=dtype, device=self.device)
            fill_dummy(parameter.name, whole, self.config.seed)
            yield parameter.name, whole

    def _read_reference(self, path: str) -> list[dict[str, torch.Tensor]]:
        """Per chunk, tensors by the names of its parameters."""
        weights: list[dict[str, torch.Tensor]] = [{} for _ in self.chunks]
        whole = iterate_weights(path, self.model_config, self.dtype)
        for parameter, part in local_parts(self.local_layout(), whole):
            weights[parameter.chunk][parameter.module_name] = part.to(self.device, copy=True)
        if (tied_copy := self.chunks[-1].tied_copy) is not None:
            weights[-1][_HEAD] = torch.empty_like(tied_copy, requires_grad=False)
        self._copy_tied(weights[0].get(_EMBEDDING), weights[-1].get(_HEAD))
        return weights

    def _refresh_tied_copy(self) -> None:
        """Gives the last stage the first one's embedding, where they are tied and on different ranks."""
        tied_copy = self.chunks[-1].tied_copy
        embedding = self._parameters.get(_EMBEDDING)
        self._copy_tied(
            None if embedding is None else embedding.detach(), None if tied_copy is None else tied_copy.detach()
        )

    def _copy_tied(self, embedding: torch.Tensor | None, head: torch.Tensor | None) -> None:
        stages = self.ranks.pipeline
        if stages.group is None or not self.model_config.tie_word_embeddings:
            return
        if stages.rank == 0:
            dist.send(embedding, stages.global_rank(stages.size - 1), group=stages.group)
        elif stages.rank == stages.size - 1:
            dist.recv(head, stages.global_rank(0), group=stages.group)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint of weights, optimizer and step (see checkpoint.py), whole or not at all.

        metadata: plain JSON values for the caller, given back by `load`. Raises FileExistsError where `path` is,
        ValueError without an optimizer.
        """
        self._require_optimizer()
        common = {
            "model": asdict(self.model_config),
            "dtype": self.config.dtype,
            "step_count": self.step_count,
            "state_hash": self._state_hash(),
            "metadata": metadata or {},
        }
        save_checkpoint(path, self._written_state(), common)

    @torch.no_grad()
    def load(self, path: str | Path) -> dict[str, Any]:
        """Restores what `save` wrote, to the bit, and returns its metadata.

        Raises MissingFileError without a checkpoint, and ValueError for one of another model, dtype or format, or with
        damaged content or without an optimizer. After an error while tensors are read, the trainer holds a mixture:
        load another checkpoint.
        """
        self._require_optimizer()
        with CheckpointFiles(path) as files:
            common = files.common
            files.require(self.model_config)
            if common["dtype"] != self.config.dtype:
                raise ValueError(f"checkpoint {path} has dtype {common['dtype']}, the trainer {self.config.dtype}")
            self.num_weight_changes += 1
            for parameter in self.local_layout():
                optimizer, index = self._optimizer_place(parameter)
                self._parameters[parameter.name].copy_(files.read(named_shard(parameter.shard, "weight")))
                for kind in optimizer.state_names(index):
                    optimizer.load_state_tensor(index, kind, files.read(named_shard(parameter.shard, kind)))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            optimizer.set_num_steps(common["step_count"])
        self._refresh_tied_copy()
        self.step_count = common["step_count"]
        if self._state_hash() != common["state_hash"]:
            raise ValueError(f"checkpoint {path} is damaged: its tensors do not have the hash that was saved with them")
        return common["metadata"]

    def _require_optimizer(self) -> None:
        if self.config.optimizer == "none":
            raise ValueError('a checkpoint holds the optimizer, and TrainerConfig.optimizer is "none"')

    def _written_state(self) -> Iterator[tuple[ParameterShard, torch.Tensor | None]]:
        """What a checkpoint holds of this rank's parts; None where another rank writes the same."""
        for parameter in self.local_layout():
            optimizer, index = self._optimizer_place(parameter)
            is_writer = self.ranks.data.rank == 0 and (parameter.shard.is_split or self.ranks.tensor.rank == 0)
            # All data-parallel ranks take part in gathering the optimizer's state.
            kinds = {kind: optimizer.state_tensor(index, kind) for kind in optimizer.state_names(index)}
            for kind, tensor in {"weight": self._parameters[parameter.name], **kinds}.items():
                yield named_shard(parameter.shard, kind), tensor if is_writer else None

    def _state_hash(self) -> str:
        """Of the whole model's weights and optimizer state: the same on all ranks, and for any number of them."""

        def state(name: str) -> Iterator[tuple[str, torch.Tensor]]:
            def local(parameter: LocalParameter) -> torch.Tensor:
                optimizer, index = self._optimizer_place(parameter)
                return optimizer.state_tensor(index, name)

            return whole_tensors(self.model_config, self.ranks, local, torch.float32, self.device)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from self.whole_weights()
            for name in self.optimizers[0].state_names(0):
                for parameter_name, tensor in state(name):
                    yield f"{parameter_name}/{name}", tensor

        return checksum(tensors())
