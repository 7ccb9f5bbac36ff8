"""Tiny EAGLE-3 drafts, and the draft's formulas in plain torch over the names of the checkpoint."""

import torch
from models import tiny_config

from lockstep.engine.models.config import parse_model_config
from lockstep.engine.models.eagle3 import Eagle3Config, Eagle3Draft


def target_config(**overrides):
    return parse_model_config(tiny_config("qwen3", **overrides).to_dict())


def make_draft(target, draft_vocab_size=40, seed=0, embedding=None, **options):
    """A draft whose weights, norms included, are all random."""
    generator = torch.Generator().manual_seed(seed)
    if embedding is None:
        embedding = torch.randn(target.vocab_size, target.hidden_size, generator=generator)
    draft = Eagle3Draft(Eagle3Config.of_target(target, draft_vocab_size, **options), embedding, torch.float32)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
    draft.set_vocabulary(torch.randperm(target.vocab_size, generator=generator)[:draft_vocab_size].sort().values)
    return draft


def norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, position, theta):
    """x [heads, D] of one token, at its position."""
    half = x.shape[-1] // 2
    angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[:, :half], x[:, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class SlowDraft:
    """One row at a time. tensors: those of a checkpoint; config: an Eagle3Config."""

    def __init__(self, tensors, config, embedding):
        self.t, self.config, self.embedding = tensors, config, embedding

    def combine(self, aux):
        """aux: three vectors."""
        if self.config.norm_aux:
            aux = [norm(a, self.t[f"fc_norm.{i}.weight"], self.config.rms_norm_eps) for i, a in enumerate(aux)]
        return self.t["fc.weight"] @ torch.cat(list(aux))

    def row(self, g, token, position, earlier):
        """(logits, feedback) of a row that sees the keys and values in `earlier` and its own, which it adds there."""
        config, eps, t = self.config, self.config.rms_norm_eps, self.t
        embedded = norm(self.embedding[token], t["midlayer.input_layernorm.weight"], eps)
        normed_g = norm(g, t["midlayer.hidden_norm.weight"], eps)
        inputs = torch.cat((embedded, normed_g))
        q, k, v = (
            (t[f"midlayer.self_attn.{part}_proj.weight"] @ inputs).view(-1, config.head_dim) for part in ("q", "k", "v")
        )
        q, k = rotate(q, position, config.rope_theta), rotate(k, position, config.rope_theta)
        seen = [*earlier, (k, v)]
        heads = []
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            scores = torch.stack([q[head] @ key[group] for key, _ in seen]) * config.head_dim**-0.5
            heads.append(sum(w * value[group] for w, (_, value) in zip(scores.softmax(0), seen, strict=True)))
        begins = normed_g if config.norm_before_residual else g
        hidden = begins + t["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
        normed = norm(hidden, t["midlayer.post_attention_layernorm.weight"], eps)
        gate, up = t["midlayer.mlp.gate_proj.weight"] @ normed, t["midlayer.mlp.up_proj.weight"] @ normed
        hidden = hidden + t["midlayer.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        out = norm(hidden, t["norm.weight"], eps)
        return t["lm_head.weight"] @ out, out if config.norm_output else hidden, (k, v)
