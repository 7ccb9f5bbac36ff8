"""The trained model: Megatron-core's GPTModel on lockstep.kernels, from packed token ids to log-probabilities."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.linear import PLAIN, LinearFormat
from lockstep.engine.ranks.rank_sum import gather_columns
from lockstep.kernels.linear.scalar_head import scalar_head
from lockstep.kernels.sampling.log_probs import VocabularyShard, log_probs
from lockstep.trainer_bridge.config import ParallelSizes
from lockstep.trainer_bridge.megatron.layer_spec import PackedSequences, block_spec
from lockstep.trainer_bridge.megatron.parallel import Ranks
from lockstep.trainer_bridge.megatron.tensor_parallel import sum_gradients, vocabulary_parallel_embedding


def transformer_config(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, sizes: ParallelSizes
) -> TransformerConfig:
    """Megatron's configuration of `model`: no dropout, no fusion, no initialization of weights (they are loaded).

    Heads and widths are each layer's own, see layer_spec; here they are what Megatron's checks let pass.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=sizes.tensor,
        ffn_hidden_size=sizes.tensor,
        normalization="RMSNorm",
        layernorm_epsilon=model.final_norm.eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        # The switch under which Megatron's MLP takes its activation from the layer spec.
        use_te_activation_func=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
    )


class ScalarHead(torch.nn.Module):
    """In the place of Megatron's output layer: a value per row. Whole on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] -> fp32 [R]."""
        return scalar_head(hidden, self.weight).squeeze(-1)


class LockstepGPTModel(GPTModel):
    """GPTModel that takes packed sequences and returns the log-probability of each row's target, or one stage of it.

    With a scalar head it returns the value of each row.

    Parameters have Megatron's names, which are the engine's, with layers numbered from 0 in each stage. Positions and
    the rotary table go to the layers inside PackedSequences; Megatron's rotary embedding and output layer are not
    called.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        chunk: int = 0,
        recompute: bool = False,
        linear_format: LinearFormat = PLAIN,
    ):
        """chunk: which of this rank's stages; see ParallelSizes.virtual_pipeline. linear_format: the engine's."""
        sizes, stage = ranks.sizes, ranks.stage(chunk)
        self._head = model.head
        num_layers = model.num_layers // sizes.num_stages
        stage_layers = range(stage * num_layers, (stage + 1) * num_layers)
        super().__init__(
            transformer_config(model, device, dtype, sizes),
            block_spec(model, recompute, sizes, stage_layers, linear_format),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=stage == 0,
            post_process=stage == sizes.num_stages - 1,
            position_embedding_type="none",
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            vp_stage=chunk if sizes.virtual_pipeline > 1 else None,
        )
        self._ranks = ranks
        self._first_token = ranks.tensor.rank * (model.vocab_size // sizes.tensor)
        self._head_parts = math.gcd(model.vocab_size, sizes.row_parallel_splits) // sizes.tensor
        self.rope_tables = {name: rope.table(device) for name, rope in model.ropes.items()}

    def setup_embeddings_and_output_layer(self) -> None:
        """Gives the last stage a scalar head. Megatron's would copy a tied weight to the last stage's CUDA device; here
        each stage is given its own."""
        if self._head == "scalar" and self.post_process:
            self.output_layer = ScalarHead(self.config)

    @property
    def tied_copy(self) -> torch.nn.Parameter | None:
        """The last stage's copy of a tied embedding's weight, where the embedding is on another stage."""
        alone = self.post_process and not self.pre_process
        return self.output_layer.weight if alone and self.share_embeddings_and_output_weights else None

    def output_weight(self) -> torch.Tensor:
        """[V / R, H]: the output layer's weight, which is the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """token_ids int64 [T] -> [T, 1, H]; the first stage's. weight: in place of its own."""
        weight = self.embedding.word_embeddings.weight if weight is None else weight
        group = self._ranks.tensor.group
        return vocabulary_parallel_embedding(token_ids, weight, self._first_token, group).unsqueeze(1)

    def run_layers(self, hidden: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[T, 1, H] -> [T, 1, H] through this stage's layers, and on the last stage the final norm.

        positions: int64 [T]; cu_seqlens: int32 [B+1].
        """
        if not self.pre_process:
            self.set_input_tensor(hidden)  # the only input that Megatron's block reads after the first stage
        return self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=PackedSequences.of(positions, cu_seqlens, self.rope_tables),
        )

    def log_probs(
        self, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, and entropies without gradient, of `targets` at some rows of hidden [T, 1, H].

        rows, targets: int64 [R] -> fp32 [R], fp32 [R], the same on all tensor-parallel ranks. No row comes twice.
        """
        group = self._ranks.tensor.group
        hidden = sum_gradients(hidden.squeeze(1).index_select(0, rows), group)
        shard = VocabularyShard(self._first_token, self.vocab_size, partial(gather_columns, group=group))
        return log_probs(
            hidden, self.output_weight(), targets, temperature, True, shard=shard, gradient_parts=self._head_parts
        )

    def values(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [R]: a scalar head's values at some rows of hidden [T, 1, H]; the same on all tensor-parallel ranks."""
        return self.output_layer(hidden.squeeze(1).index_select(0, rows))

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        received: torch.Tensor | None = None,
        embedding_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | torch.Tensor:
        """The last stage: `log_probs`, or (`values`, None). Another stage: hidden states [T, 1, H] for the next.

        token_ids, positions: int64 [T]; cu_seqlens: int32 [B+1]; rows, targets: int64 [R]. received: the hidden states
        of the stage before. embedding_weight: see `embed`.
        """
        hidden = self.embed(token_ids, embedding_weight) if self.pre_process else received
        hidden = self.run_layers(hidden, positions, cu_seqlens)
        if not self.post_process:
            return hidden
        if self._head == "scalar":
            return self.values(hidden, rows), None
        return self.log_probs(hidden, rows, targets, temperature)
