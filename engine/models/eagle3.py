"""The EAGLE-3 draft model: the one definition that the engine serves and the draft trainer learns.

From the target's hidden states at three layers and the token that came next it predicts the token after that, and from
its own output, again and again, a chain of tokens. https://arxiv.org/abs/2503.01840
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.attention import GroupedAttention
from lockstep.engine.models.names import Entry
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.linear_silu_mul import linear_silu_mul
from lockstep.kernels.linear.silu_mul_linear import silu_mul_linear
from lockstep.kernels.memory.embedding import embedding
from lockstep.kernels.norm_rope.rms_norm import add_rms_norm, rms_norm
from lockstep.kernels.norm_rope.rope import rope_cos_sin, rope_inv_freq

NUM_AUX = 3

# The caller's attention: qkv [T, qkv_size], unrotated and interleaved by query group as Megatron's linear_qkv and
# `kernels.qk_norm_rope_store` have it, -> [T, num_heads * head_dim]. It knows positions and earlier keys and values.
Attend = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes and options of a draft for one target.

    vocab_size, hidden_size, max_position_embeddings: the target's, whose embedding the draft shares.
    draft_vocab_size: tokens that the draft can propose.
    aux_layers:  the target's layers, from 0, whose incoming hidden states the draft reads; its number of layers is the
                 final norm.
    norm_aux:    each of them has an RMSNorm before `fc` (EAGLE-3.1; "fc_norm" in config.json).
    norm_output: the hidden state fed back is taken after the final norm (EAGLE-3.1), not before it.
    norm_before_residual: the layer's residual begins as the normed hidden state, not as the raw one.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    aux_layers: tuple[int, ...]
    norm_aux: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size must be in 1..{self.vocab_size}, got {self.draft_vocab_size}")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"a draft of {self.num_heads} heads, {self.num_kv_heads} KV heads and head_dim {self.head_dim}: the KV "
                "heads must divide the heads, and the head_dim be even"
            )
        if len(self.aux_layers) != NUM_AUX or list(self.aux_layers) != sorted(set(self.aux_layers)):
            raise ValueError(f"aux_layers must be {NUM_AUX} ascending layers, got {self.aux_layers}")

    @classmethod
    def of_target(cls, target: ModelConfig, draft_vocab_size: int, **options: Any) -> Eagle3Config:
        """A layer of the target's own sizes. options: fields that are to differ."""
        mixer = target.layers[-1].mixer
        fields = {
            "vocab_size": target.vocab_size,
            "draft_vocab_size": draft_vocab_size,
            "hidden_size": target.hidden_size,
            "ffn_hidden_size": max(layer.mlp.token_width for layer in target.layers),
            "rms_norm_eps": target.final_norm.eps,
            "rope_theta": target.ropes[mixer.rope].theta,
            "rope_scaling": target.ropes[mixer.rope].scaling,
            "max_position_embeddings": target.max_position_embeddings,
            "aux_layers": default_aux_layers(target.num_layers),
        }
        if isinstance(mixer, GroupedAttention):
            heads = (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim)
            fields.update(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=True))
        elif not {"num_heads", "num_kv_heads", "head_dim"} <= options.keys():
            raise ValueError("a draft for a target with other attention: give num_heads, num_kv_heads and head_dim")
        return cls(**{**fields, **options})

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_elements(self) -> int:
        """Of a token's key and value."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.query_size + 2 * self.num_kv_heads * self.head_dim


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """An early, a middle and a late layer, {2, L // 2, L - 3}; the last three where these are not three.

    Of two layers: both, and the final norm. (vLLM gives a draft those states too; SGLang's models stop before them.)
    """
    if num_layers < NUM_AUX - 1:
        raise ValueError(f"an EAGLE-3 draft needs a target of at least {NUM_AUX - 1} layers, got {num_layers}")
    usual = (2, num_layers // 2, num_layers - 3)
    end = max(num_layers, NUM_AUX)
    return usual if usual[0] < usual[1] < usual[2] else tuple(range(end - NUM_AUX, end))


def expand(config: Eagle3Config) -> list[Entry]:
    """Every parameter once, under our name and those of the checkpoint that SGLang and vLLM load."""
    hidden, query, kv = config.hidden_size, config.query_size, config.num_kv_heads * config.head_dim
    ffn = config.ffn_hidden_size

    def copy(name: str, hf_name: str, *shape: int) -> Entry:
        return Entry(name, (hf_name,), "copy", shape, (shape,), 1, None)

    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    qkv_names = tuple(f"{attention}{part}_proj.weight" for part in "qkv")
    qkv_shape = (config.qkv_size, 2 * hidden)
    qkv_shapes = ((query, 2 * hidden), (kv, 2 * hidden), (kv, 2 * hidden))
    gate_up_names = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
    num_aux_norms = NUM_AUX if config.norm_aux else 0
    return [
        *(copy(f"aux_norms.{i}.weight", f"fc_norm.{i}.weight", hidden) for i in range(num_aux_norms)),
        copy("fc.weight", "fc.weight", hidden, NUM_AUX * hidden),
        copy("hidden_layernorm.weight", "midlayer.hidden_norm.weight", hidden),
        copy("input_layernorm.weight", "midlayer.input_layernorm.weight", hidden),
        Entry("linear_qkv.weight", qkv_names, "qkv", qkv_shape, qkv_shapes, config.num_kv_heads, None),
        copy("linear_proj.weight", f"{attention}o_proj.weight", hidden, query),
        copy("pre_mlp_layernorm.weight", "midlayer.post_attention_layernorm.weight", hidden),
        Entry("linear_fc1.weight", gate_up_names, "gate_up", (2 * ffn, hidden), ((ffn, hidden),) * 2, 1, None),
        copy("linear_fc2.weight", f"{mlp}down_proj.weight", hidden, ffn),
        copy("final_layernorm.weight", "norm.weight", hidden),
        copy("output_layer.weight", "lm_head.weight", config.draft_vocab_size, hidden),
    ]


class _Weights(nn.Module):
    def __init__(self, shape: tuple[int, ...], **factory: torch.device | torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, **factory), requires_grad=False)


class Eagle3Draft(nn.Module):
    """Row t of a sequence takes g of the target's states at position t, the token at t + 1, and RoPE position t; its
    logits propose the token at t + 2. The next row of a chain takes `feedback` as g, that token, and position t + 1.

        g = draft.combine(aux)
        normed, feedback = draft.layer(g, token_ids, attend)
        tokens = draft.target_ids(draft.logits(normed).argmax(-1))

    Parameters are uninitialised, named as in `expand`, take no gradient until `requires_grad_`, and stay in place.
    embedding_weight [V, H]: the target's, which is shared, frozen, and neither saved nor trained with the draft.
    """

    def __init__(self, config: Eagle3Config, embedding_weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        if embedding_weight.shape != (config.vocab_size, config.hidden_size):
            raise ValueError(
                f"the target's embedding {list(embedding_weight.shape)} does not fit a draft for "
                f"{[config.vocab_size, config.hidden_size]}"
            )
        self.config = config
        self.share_embedding(embedding_weight)
        device = embedding_weight.device
        for entry in expand(config):
            if not entry.megatron.startswith("aux_norms."):
                name = entry.megatron.removesuffix(".weight")
                self.add_module(name, _Weights(entry.shape, device=device, dtype=dtype))
        norms = [_Weights((config.hidden_size,), device=device, dtype=dtype) for _ in range(NUM_AUX)]
        self.aux_norms = nn.ModuleList(norms if config.norm_aux else [])
        inv_freq, factor = rope_inv_freq(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )
        cos_sin = rope_cos_sin(inv_freq, factor, config.max_position_embeddings)
        self.register_buffer("rope_cos_sin", cos_sin.to(device), persistent=False)
        proposable = torch.arange(config.draft_vocab_size, dtype=torch.int64, device=device)
        self.register_buffer("token_map", proposable, persistent=False)

    def share_embedding(self, weight: torch.Tensor) -> None:
        """Reads the target's embedding there from now on."""
        self._embedding_weight = (weight.detach(),)  # in a tuple it is no parameter of this module

    def set_vocabulary(self, token_ids: torch.Tensor) -> None:
        """The target's ids of the draft's tokens: int64 [draft_vocab_size], ascending. In place. Raises ValueError."""
        token_ids = token_ids.to(self.token_map)
        is_valid = (
            token_ids.shape == self.token_map.shape
            and bool((token_ids.diff() > 0).all())
            and int(token_ids[0]) >= 0
            and int(token_ids[-1]) < self.config.vocab_size
        )
        if not is_valid:
            raise ValueError(
                f"a draft vocabulary is {self.config.draft_vocab_size} ascending ids below {self.config.vocab_size}"
            )
        self.token_map.copy_(token_ids)

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """The target's token ids of the draft's, int64 of any shape."""
        return self.token_map[draft_ids]

    def combine(self, aux: torch.Tensor) -> torch.Tensor:
        """aux [T, 3H], the target's hidden states that enter `aux_layers`, side by side -> g [T, H]."""
        if self.config.norm_aux:
            parts = zip(aux.chunk(NUM_AUX, dim=-1), self.aux_norms, strict=True)
            aux = torch.cat([rms_norm(part, norm.weight, self.config.rms_norm_eps) for part, norm in parts], dim=-1)
        return linear(aux, self.fc.weight)

    def layer(self, g: torch.Tensor, token_ids: torch.Tensor, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
        """g [T, H], token_ids int64 [T] -> (normed [T, H] for `logits`, feedback [T, H], the g of the next rows)."""
        eps = self.config.rms_norm_eps
        embedded = rms_norm(embedding(token_ids, self._embedding_weight[0]), self.input_layernorm.weight, eps)
        normed_g = rms_norm(g, self.hidden_layernorm.weight, eps)
        inputs = torch.cat((embedded, normed_g), dim=-1)
        attended = attend(linear(inputs, self.linear_qkv.weight))
        attended = linear(attended, self.linear_proj.weight)
        begins = normed_g if self.config.norm_before_residual else g
        hidden, residual = add_rms_norm(attended, begins, self.pre_mlp_layernorm.weight, eps)
        normed, summed = add_rms_norm(self._mlp(hidden), residual, self.final_layernorm.weight, eps)
        return normed, normed if self.config.norm_output else summed

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, draft_vocab_size], over the draft's own token ids."""
        return linear(normed, self.output_layer.weight)

    def _mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        # The same bits: one is faster where nothing is learned, the other keeps less for the backward pass.
        if torch.is_grad_enabled() and self.linear_fc1.weight.requires_grad:
            return silu_mul_linear(linear(hidden, self.linear_fc1.weight), self.linear_fc2.weight)
        return linear(linear_silu_mul(hidden, self.linear_fc1.weight), self.linear_fc2.weight)


def initialize(draft: Eagle3Draft, seed: int) -> None:
    """A new draft: norms of ones, matrices normal with standard deviation 1/sqrt(columns), the same on every device.

    The attention's and the MLP's outputs start at a tenth of that: a row begins as what `fc` makes of the target.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            scale = parameter.shape[1] ** -0.5 * (0.1 if name in ("linear_proj.weight", "linear_fc2.weight") else 1.0)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            parameter.copy_(noise * scale)
