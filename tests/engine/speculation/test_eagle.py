"""The drafts of an EAGLE-3 model against the same model run over each text from its beginning, without an engine."""

import pytest
import torch
from drafts import make_draft
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.engine.memory.layer_caches import new_layer_caches
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.eagle3 import initialize
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart
from lockstep.engine.models.layers.latent_attention import LatentAttention
from lockstep.kernels.attention.attention import attention
from lockstep.kernels.memory.kv_cache import new_kv_cache
from lockstep.kernels.norm_rope.qk_norm_rope_store import qk_norm_rope_store
from lockstep.kernels.sampling.noise import gumbel_noise_reference

VOCAB, LONGEST = 131, 96
PAGES = torch.arange(7, dtype=torch.int32)[None]  # of 16 tokens, of a text alone


def make_target_and_draft(tmp_path_factory, family, **sizes):
    path, draft_path = str(tmp_path_factory.mktemp("model")), str(tmp_path_factory.mktemp("draft") / "draft")
    make_hf_model(path, family, seed=3, **sizes)
    config = load_model_config(path)
    heads = (
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
        if isinstance(config.layers[0].mixer, LatentAttention)
        else {}
    )
    save_draft(draft_path, make_draft(config, draft_vocab_size=60, seed=4, **heads))
    return path, draft_path


@pytest.fixture(scope="module")
def qwen3_paths(tmp_path_factory):
    return make_target_and_draft(tmp_path_factory, "qwen3")


def engine_of(paths, **settings):
    path, draft = paths
    return Engine(
        EngineConfig(model=path, draft_model=draft, draft_min_accepted=0.0, max_model_len=LONGEST, **settings)
    )


def target_states(model, tokens, aux_layers):
    """aux [T, 3H] of a text, in one pass over pages of its own."""
    length = len(tokens)
    caches = new_layer_caches(model.config.caches, 7, 16, torch.float32, "cpu")
    ends = torch.tensor([0, length], dtype=torch.int32)
    part = AttentionPart(length, PAGES, ends, ends[1:])
    positions = torch.arange(length)
    return model.forward_with_aux(tokens, positions, AttentionContext(caches, positions, (part,)), aux_layers)[1]


@torch.inference_mode()
def expected_chain(model, draft, request, num_tokens):
    """The drafts after request.tokens: row t reads the states at t and the token at t + 1."""
    tokens, config = torch.tensor(request.tokens), draft.config
    cache = new_kv_cache(7, 16, config.num_kv_heads, config.head_dim, torch.float32, "cpu")

    def rows(g, next_tokens, start):
        def attend(qkv):
            positions = torch.arange(start, start + len(qkv))
            q = qk_norm_rope_store(
                qkv, None, None, config.rms_norm_eps, draft.rope_cos_sin, positions, *cache, positions
            )
            ends = torch.tensor([0, len(qkv)], dtype=torch.int32)
            kv_lens = torch.tensor([start + len(qkv)], dtype=torch.int32)
            return attention(q, *cache, PAGES, ends, kv_lens, config.head_dim**-0.5).flatten(1)

        normed, feedback = draft.layer(g, next_tokens, attend)
        return draft.logits(normed)[-1], feedback[-1:]

    aux = target_states(model, tokens[:-1], config.aux_layers)
    logits, feedback = rows(draft.combine(aux), tokens[1:], 0)
    chain = []
    for position in range(len(tokens), len(tokens) + num_tokens):
        scores = logits
        if request.params.temperature > 0:
            noise = gumbel_noise_reference(torch.tensor([request.seed]), torch.tensor([position]), VOCAB)[0]
            scores = logits / torch.tensor(request.params.temperature) + noise[draft.token_map]
        chain.append(int(draft.token_map[scores.argmax()]))
        logits, feedback = rows(feedback, torch.tensor(chain[-1:]), position - 1)
    return chain


CHUNKS = {"num_draft_tokens": 4, "max_prefill_tokens": 5, "page_size": 8}
PREEMPTION = {"num_draft_tokens": 8, "page_size": 4, "kv_cache_tokens": 96, "max_prefill_tokens": 7}


@pytest.mark.parametrize(
    ("family", "sizes", "settings"),
    [
        ("qwen3", {}, {"num_draft_tokens": 1}),
        ("qwen3", {}, CHUNKS),
        ("qwen3", {"num_hidden_layers": 2}, CHUNKS),
        ("mistral", {}, CHUNKS),
        ("deepseek_v3", {}, PREEMPTION),
    ],
    ids=["k1", "chunks", "two_layers", "windows", "preemption"],
)
def test_drafts_are_those_of_the_whole_text(family, sizes, settings, tmp_path_factory):
    engine = engine_of(make_target_and_draft(tmp_path_factory, family, **sizes), **settings)
    engine.speculation.policy.record_drafts = lambda request, num_accepted: None
    draft, propose, seen = engine.draft.draft, engine.speculation.drafter.propose, []

    def checked(request, num_tokens):
        drafts = propose(request, num_tokens)
        if drafts and request.request_id % 2:
            expected = expected_chain(engine.model, draft, request, len(drafts))
            # Without free pages behind its text, a chain does not see its own first tokens.
            whole = len(request.pages) * engine.memory.page_size >= len(request.tokens) + len(drafts)
            seen.append(drafts == expected)
            assert seen[-1] or not whole
        return drafts

    engine.speculation.drafter.propose = checked
    shared = list(range(3, 22))
    prompts = [[*shared, 50, 51, 52], [*shared, 60], [9, 8, 7], [*shared, 50, 51, 53]]
    params = [SamplingParams(max_tokens=12, temperature=t, seed=i) for i, t in enumerate((1.0, 0.0, 1.0, 0.7))]
    engine.generate(prompts, params)
    assert sum(seen) >= 8
    stats = engine.stats()
    assert stats["cached_tokens"] > 0 or stats["preemptions"] > 0 or settings == {"num_draft_tokens": 1}


def test_a_swapped_draft_drafts_at_once_and_changes_nothing_else(qwen3_paths):
    engine = engine_of(qwen3_paths, num_draft_tokens=3)
    prompt, params = [5, 6, 7, 8], SamplingParams(max_tokens=20, seed=1)
    want = Engine(EngineConfig(model=qwen3_paths[0])).generate([prompt], params)[0]
    other = make_draft(engine.model_config, draft_vocab_size=60, seed=9)
    initialize(other, seed=5)
    tensors = {**dict(other.named_parameters()), "token_map": other.token_map}
    (request,) = engine.submit([prompt], params)
    for _ in range(4):
        engine.step()
    engine.update_draft(tensors.items(), version=3)
    while request.finish_reason is None:
        engine.step()
    output = engine.output(request)
    assert (output.token_ids, output.logprobs) == (want.token_ids, want.logprobs)
    assert engine.stats()["draft_version"] == 3
    served = engine.draft.update_targets()
    assert all(torch.equal(served[name], tensor) for name, tensor in tensors.items())


def test_a_bad_update_leaves_the_draft_as_it_was(qwen3_paths):
    engine = engine_of(qwen3_paths, num_draft_tokens=3)
    served = engine.draft.update_targets()
    before = {name: tensor.clone() for name, tensor in served.items()}
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is 'fc.weight'"):
        engine.update_draft([(n, torch.zeros_like(t)) for n, t in served.items() if n != "fc.weight"], 1)
    with pytest.raises(ValueError, match="a draft vocabulary is 60 ascending ids"):
        engine.update_draft([(n, torch.zeros_like(t)) for n, t in served.items()], 1)
    with pytest.raises(ValueError, match="draft version must grow: 0 after 0"):
        engine.update_draft(before.items(), 0)
    assert all(torch.equal(served[name], tensor) for name, tensor in before.items())
    assert engine.stats()["draft_version"] == 0
    ngram = Engine(EngineConfig(model=qwen3_paths[0], draft_model="ngram", num_draft_tokens=2))
    with pytest.raises(ValueError, match="no draft model, draft_model='ngram'"):
        ngram.update_draft(before.items(), 1)


def test_shared_weights_bring_their_embedding_to_the_draft(qwen3_paths):
    engine = engine_of(qwen3_paths, num_draft_tokens=2)
    tensors = {name: tensor.clone() for name, tensor in engine.weight_targets.items()}
    engine.alias_weights(tensors.items(), version=1, num_changes=lambda: 0)
    embedding = engine.draft.draft._embedding_weight[0]
    assert embedding.data_ptr() == tensors["embedding.word_embeddings.weight"].data_ptr()


def test_sleep_gives_the_drafts_cache_back_too(qwen3_paths):
    engine = engine_of(qwen3_paths, num_draft_tokens=2)
    prompt, params = [1, 2, 3], SamplingParams(max_tokens=8)
    first = engine.generate([prompt], params)[0]
    engine.sleep()
    assert engine.draft.kv_cache == ()
    engine.wake()
    assert engine.generate([prompt], params)[0].logprobs == first.logprobs


def test_the_draft_is_loaded_with_the_targets_embedding(qwen3_paths):
    engine = engine_of(qwen3_paths, num_draft_tokens=2)
    loaded = load_draft(qwen3_paths[1], engine.model_config, engine.model.embedding.word_embeddings.weight)
    draft = engine.draft.draft
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), draft.parameters(), strict=True))
    assert draft._embedding_weight[0].data_ptr() == engine.model.embedding.word_embeddings.weight.data_ptr()
