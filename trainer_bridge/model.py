"""The trained model: Megatron-core's GPTModel on lockstep.kernels, from packed token ids to log-probabilities."""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from lockstep.engine.models.config import ModelConfig
from lockstep.kernels.embedding import embedding
from lockstep.kernels.log_probs import log_probs
from lockstep.kernels.rope import rope_cos_sin, rope_inv_freq
from lockstep.trainer_bridge.layer_spec import PackedSequences, block_spec


def transformer_config(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of `model`: no dropout, no fusion, no initialization of weights (they are loaded)."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        # The switch under which Megatron's MLP takes its activation from the layer spec.
        use_te_activation_func=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
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
        # Checkpoints name each layer's tensors, instead of stacking those of all layers: not all layers have the same.
        hetereogenous_dist_checkpoint=model.moe is not None,
    )


class LockstepGPTModel(GPTModel):
    """GPTModel that takes packed sequences and returns the log-probability of each row's target.

    Parameters have Megatron's names, which are the engine's. Positions and the rotary table go to the layers inside
    PackedSequences; Megatron's rotary embedding and output layer are not called.
    """

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype, recompute: bool = False):
        super().__init__(
            transformer_config(model, device, dtype),
            block_spec(model, recompute),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="none",
            share_embeddings_and_output_weights=model.tie_word_embeddings,
        )
        inv_freq, attention_factor = rope_inv_freq(
            model.head_dim, model.rope_theta, model.rope_scaling, model.max_position_embeddings
        )
        table = rope_cos_sin(inv_freq, attention_factor, model.max_position_embeddings)
        self.register_buffer("rope_table", table.to(device), persistent=False)

    def output_weight(self) -> torch.Tensor:
        """[V, H]: the output layer's weight, which is the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def hidden_states(self, token_ids: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """token_ids, positions: int64 [T]; cu_seqlens: int32 [B+1] -> hidden [T, H] after the final norm."""
        embedded = embedding(token_ids, self.embedding.word_embeddings.weight)
        hidden = self.decoder(
            hidden_states=embedded.unsqueeze(1),
            attention_mask=None,
            packed_seq_params=PackedSequences.of(positions, cu_seqlens, self.rope_table),
        )
        return hidden.squeeze(1)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, and entropies without gradient, of `targets` at some rows of the pack.

        token_ids, positions: int64 [T]; cu_seqlens: int32 [B+1]; rows, targets: int64 [R] -> fp32 [R], fp32 [R]. No row
        comes twice.
        """
        hidden = self.hidden_states(token_ids, positions, cu_seqlens)
        return log_probs(hidden.index_select(0, rows), self.output_weight(), targets, temperature, with_entropy=True)
