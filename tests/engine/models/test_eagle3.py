"""The draft's formulas, and the target's hidden states that it reads."""

import pytest
import torch
from drafts import SlowDraft, make_draft, target_config
from models import make_hf_model
from safetensors.torch import load_file

from lockstep.engine.checkpoints.checkpoint import load_into
from lockstep.engine.checkpoints.draft_checkpoint import save_draft
from lockstep.engine.memory.layer_caches import new_layer_caches
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.eagle3 import default_aux_layers
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart
from lockstep.kernels.attention.attention import attention
from lockstep.kernels.memory.kv_cache import new_kv_cache
from lockstep.kernels.norm_rope.qk_norm_rope_store import qk_norm_rope_store
from lockstep.kernels.norm_rope.rms_norm import rms_norm


class PagedAttention:
    """What an engine injects: one sequence whose rows come in order."""

    def __init__(self, draft, num_pages=4, page_size=16):
        config = draft.config
        self.draft, self.length = draft, 0
        self.caches = new_kv_cache(num_pages, page_size, config.num_kv_heads, config.head_dim, torch.float32, "cpu")
        self.pages = torch.arange(num_pages, dtype=torch.int32)[None]

    def __call__(self, qkv):
        config, rows = self.draft.config, torch.arange(self.length, self.length + len(qkv))
        self.length += len(qkv)
        q = qk_norm_rope_store(qkv, None, None, 1e-6, self.draft.rope_cos_sin, rows, *self.caches, rows)
        cu_seqlens, kv_lens = torch.tensor([0, len(qkv)], dtype=torch.int32), torch.tensor([self.length]).int()
        return attention(q, *self.caches, self.pages, cu_seqlens, kv_lens, config.head_dim**-0.5).flatten(1)


@pytest.mark.parametrize("options", [{}, {"norm_aux": True, "norm_output": True}, {"norm_before_residual": True}])
def test_a_chain_equals_the_formulas(options, tmp_path):
    target = target_config()
    draft = make_draft(target, **options)
    save_draft(tmp_path / "draft", draft)
    slow = SlowDraft(load_file(tmp_path / "draft" / "model.safetensors"), draft.config, draft._embedding_weight[0])
    torch.manual_seed(1)
    aux, tokens = torch.randn(9, 3 * target.hidden_size), torch.randint(0, target.vocab_size, (9,))
    attend, earlier = PagedAttention(draft), []
    normed, feedback = draft.layer(draft.combine(aux), tokens, attend)
    logits = [draft.logits(normed)]
    for position in range(9):
        expected, g, key_value = slow.row(slow.combine(aux[position].chunk(3)), tokens[position], position, earlier)
        earlier.append(key_value)
        torch.testing.assert_close(logits[0][position], expected, rtol=1e-5, atol=1e-5)  # another order of sums
    # Two more tokens of a chain, from the draft's own states.
    feedback = feedback[-1:]
    for position in (9, 10):
        token = draft.target_ids(logits[-1][-1:].argmax(-1))
        normed, feedback = draft.layer(feedback, token, attend)
        logits.append(draft.logits(normed))
        expected, g, key_value = slow.row(g, token[0], position, earlier)
        earlier.append(key_value)
        torch.testing.assert_close(logits[-1][0], expected, rtol=1e-5, atol=1e-5)


def test_learning_changes_no_bit():
    draft = make_draft(target_config())
    aux, tokens = torch.randn(9, 3 * draft.config.hidden_size), torch.arange(9)
    served = draft.logits(draft.layer(draft.combine(aux), tokens, lambda qkv: qkv[:, : draft.config.query_size])[0])
    draft.requires_grad_(True)
    learned = draft.logits(draft.layer(draft.combine(aux), tokens, lambda qkv: qkv[:, : draft.config.query_size])[0])
    assert learned.requires_grad
    assert torch.equal(learned.detach(), served)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (36, (2, 18, 33)),
        (28, (2, 14, 25)),
        (7, (2, 3, 4)),
        (6, (3, 4, 5)),
        (4, (1, 2, 3)),
        (3, (0, 1, 2)),
        (2, (0, 1, 2)),
    ],
)
def test_default_aux_layers(num_layers, expected):
    assert default_aux_layers(num_layers) == expected


def test_a_target_of_one_layer_is_refused():
    with pytest.raises(ValueError, match="at least 2 layers, got 1"):
        default_aux_layers(1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_aux_states_are_the_targets_and_cost_no_bit(family, tmp_path):
    reference = make_hf_model(tmp_path, family, seed=2)
    decoder = Decoder(load_model_config(tmp_path), "cpu", torch.float32)
    load_into(decoder, tmp_path)
    tokens = torch.arange(20) * 5 % 131
    positions, last_rows = torch.arange(20), torch.tensor([19])
    pages, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    caches = new_layer_caches(decoder.config.caches, 2, 16, torch.float32, "cpu")
    part = AttentionPart(20, pages, torch.tensor([0, 20], dtype=torch.int32), lengths)
    context = AttentionContext(caches, positions, (part,))
    last_part = AttentionPart(1, pages, torch.tensor([0, 1], dtype=torch.int32), lengths)
    last_context = AttentionContext(caches, positions, (last_part,), last_rows)
    with torch.inference_mode():
        expected = reference(tokens[None], output_hidden_states=True).hidden_states
        plain = decoder(tokens, positions, context)
        for layers in ((0, 1, 2), (2,), (1, 2)):
            hidden, aux = decoder.forward_with_aux(tokens, positions, context, layers)
            assert torch.equal(hidden, plain)
            # transformers adds the residual in another place: the bits may differ
            torch.testing.assert_close(aux, torch.cat([expected[n][0] for n in layers], -1), rtol=1e-4, atol=1e-4)
            last, all_rows_aux = decoder.forward_with_aux(tokens, positions, context, layers, last_context)
            assert torch.equal(last, plain[-1:])
            assert torch.equal(all_rows_aux, aux)
        hidden, aux = decoder.forward_with_aux(tokens, positions, context, (1, 2, 3))
        assert torch.equal(hidden, plain)
        entering_the_norm = aux[:, -decoder.config.hidden_size :]
        weight, eps = decoder.decoder.final_layernorm.weight, decoder.config.final_norm.eps
        assert torch.equal(rms_norm(entering_the_norm, weight, eps), plain)
