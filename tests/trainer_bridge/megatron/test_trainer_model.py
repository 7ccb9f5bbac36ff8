"""The trained model against the engine's decoder to the bit, and against transformers in values and gradients."""

from dataclasses import replace

import pytest
import torch
from models import EXPERTS, FAMILY_NAMES, make_hf_model, named_like_in_files

from lockstep.engine.checkpoints.checkpoint import load_into
from lockstep.engine.memory.layer_caches import new_layer_caches
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.names import expand, to_megatron
from lockstep.engine.weights.dummy_weights import initialize_dummy
from lockstep.kernels.sampling.log_probs import token_log_probs
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.megatron.layer_spec import PackedSequences
from lockstep.trainer_bridge.megatron.model import LockstepGPTModel
from lockstep.trainer_bridge.megatron.step_gradients import backward
from lockstep.trainer_bridge.packing import TrainSequence, pack

CASES = {
    **{family: (family, {}) for family in FAMILY_NAMES},
    "llama, all biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie": True}),
    "llama, mlp bias only, one kv head": ("llama", {"mlp_bias": True, "num_key_value_heads": 1}),
    "deepseek_v3, experts": ("deepseek_v3", EXPERTS),
    "deepseek_v2, whole queries, mlp biases": ("deepseek_v2", {"q_lora_rank": None, "mlp_bias": True}),
    "deepseek_v3, three heads, yarn": (
        "deepseek_v3",
        {
            "hidden_size": 60,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
            },
        },
    ),
    "qwen2, windows on upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie": True},
    ),
    "qwen3 moe, a dense layer, weights sum to 1": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
}
PAGE_SIZE = 16


def random_sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def decoder_logprobs(decoder, sequence, temperature, chunk):
    """A sequence's log-probs as the engine computes them: through a paged cache, `chunk` tokens a step."""
    config = decoder.config
    num_pages = -(-len(sequence) // PAGE_SIZE)
    page_table = torch.arange(num_pages, dtype=torch.int32).flip(0)[None]
    kv_caches = new_layer_caches(config.caches, num_pages, PAGE_SIZE, torch.float32, "cpu")
    tokens, hidden = torch.tensor(sequence), []
    for start in range(0, len(sequence), chunk):
        positions = torch.arange(start, min(start + chunk, len(sequence)))
        slots = page_table[0, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        part = AttentionPart(
            num_rows=len(positions),
            page_table=page_table,
            cu_seqlens_q=torch.tensor([0, len(positions)], dtype=torch.int32),
            kv_lens=torch.tensor([start + len(positions)], dtype=torch.int32),
        )
        hidden.append(decoder(tokens[positions], positions, AttentionContext(kv_caches, slots, (part,))))
    logits = decoder.logits(torch.cat(hidden)[:-1])
    return token_log_probs(logits, tokens[1:], torch.full((len(sequence) - 1,), temperature))


@pytest.mark.parametrize("case", CASES)
def test_names_and_log_probs_are_the_decoders(case, tmp_path):
    family, options = CASES[case]
    hf = make_hf_model(tmp_path, family, seed=1, **options)
    decoder = Decoder(load_model_config(tmp_path), "cpu", torch.float32)
    load_into(decoder, tmp_path)
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path)))
    weights = dict(trainer.named_weights())
    assert {n: p.shape for n, p in decoder.named_parameters()} == {n: p.shape for n, p in weights.items()}
    assert all(torch.equal(p, weights[n]) for n, p in decoder.named_parameters())

    sequences = random_sequences([50, 2, 75, 33])
    for temperature in (1.0, 0.6):
        logprobs = trainer.logprobs(sequences, temperature)
        for sequence, values in zip(sequences, logprobs, strict=True):
            assert values[0] is None
            for chunk in (len(sequence), 13):
                by_engine = decoder_logprobs(decoder, sequence, temperature, chunk)
                assert torch.equal(torch.tensor(values[1:]), by_engine)
            with torch.no_grad():
                logits = hf(torch.tensor([sequence])).logits[0] / temperature
            by_hf = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(values[1:]), by_hf, atol=1e-4, rtol=0)


def test_every_kind_of_routing_has_the_decoders_bits(tmp_path):
    """Options that no served family has yet: the trainer's layer and the engine's on the same random weights."""
    make_hf_model(tmp_path, "qwen3_moe", seed=1)
    config = load_model_config(tmp_path)
    first, *others = config.layers
    moe = replace(
        first.mlp,
        shared_ffn_hidden_size=48,
        scoring="sigmoid",
        has_expert_bias=True,
        num_groups=3,
        top_groups=2,
        group_score="sum_of_top_2",
        normalize_weights=True,
        weight_scale=2.5,
        fp32_logits=True,
    )
    dense = replace(first, mlp=GatedMLP(96))
    config = replace(config, layers=(dense, *(replace(layer, mlp=moe) for layer in others)))
    decoder = Decoder(config, "cpu", torch.float32)
    ranks = MegatronTrainer(TrainerConfig(model=str(tmp_path))).ranks
    model = LockstepGPTModel(config, torch.device("cpu"), torch.float32, ranks)
    assert {n: p.shape for n, p in decoder.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    initialize_dummy(decoder, seed=3)
    initialize_dummy(model, seed=3)
    (sequence,) = random_sequences([60])
    positions, cu_seqlens = torch.arange(60), torch.tensor([0, 60], dtype=torch.int32)
    tokens = torch.tensor(sequence)
    logprobs, _ = model(tokens, positions, cu_seqlens, positions[:-1], tokens[1:], 1.0)
    assert torch.equal(logprobs.detach(), decoder_logprobs(decoder, sequence, 1.0, 7))
    logprobs.sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2)]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_log_probs_do_not_depend_on_the_packing(family, tmp_path):
    make_hf_model(tmp_path, family, seed=2)
    sequences = random_sequences([7, 40, 1, 64, 23, 5, 90])
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path)))
    together = trainer.logprobs(sequences)
    assert [len(values) for values in together] == [len(sequence) for sequence in sequences]
    assert [trainer.logprobs([sequence])[0] for sequence in sequences] == together
    assert trainer.logprobs(sequences[::-1])[::-1] == together
    small_bins = MegatronTrainer(TrainerConfig(model=str(tmp_path), max_tokens_per_micro_batch=91))
    assert small_bins.logprobs(sequences) == together


def sft_batches(sequences, max_tokens):
    training = [TrainSequence(s, [False, *(t % 3 != 0 for t in range(1, len(s)))]) for s in sequences]
    return pack(training, max_tokens, temperature=0.8)


def hf_gradients(hf, sequences, config):
    """Gradients, under Megatron's names, of sft_batches' loss by transformers and autograd."""
    hf.zero_grad()
    total, count = 0.0, 0
    for s in sequences:
        logprobs = (hf(torch.tensor([s])).logits[0] / 0.8).log_softmax(-1)
        for t in range(1, len(s)):
            if t % 3 != 0:
                total, count = total - logprobs[t - 1, s[t]], count + 1
    (total / count).backward()
    gradients = named_like_in_files((name, parameter.grad) for name, parameter in hf.named_parameters())
    return (total / count).item(), {
        entry.megatron: to_megatron(entry, [gradients[name] for name in entry.hf_names])
        for entry in expand(config)
        if not entry.megatron.endswith("expert_bias")  # which nothing trains
    }


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_transformers(case, recompute, tmp_path):
    family, options = CASES[case]
    hf = make_hf_model(tmp_path, family, seed=3, **options).double()
    sequences = random_sequences([20, 45, 31])
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path), recompute=recompute))
    expected_loss, expected = hf_gradients(hf, sequences, trainer.model_config)
    loss = sum(
        part["loss"]
        for part in backward(trainer.trained_model, trainer.optimizers, sft_batches(sequences, 64), sft_loss)
    )
    for optimizer in trainer.optimizers:
        optimizer.reduce_gradients()
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        # fp32 against fp64: rounding of about 1e-6 per operation, over three layers and cancelling sums.
        scale = expected[name].abs().max().item()
        assert scale > 1e-4, f"{name} has no gradient to compare"
        torch.testing.assert_close(
            parameter.grad.double(), expected[name], atol=2e-5 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_layer_keeps_for_the_backward_pass(tmp_path, recompute):
    """The budget that decides how many tokens fit on a GPU: floats per token of a layer."""
    make_hf_model(tmp_path, "qwen3", seed=1)
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path), recompute=recompute, optimizer="none"))
    config, num_tokens = trainer.model_config, 48  # a multiple of 16: the CPU's matrix product pads to one
    not_counted = [*trainer.model.parameters(), *trainer.model.rope_tables.values()]
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes() // 4, tensor)
        return tensor

    hidden = torch.randn(num_tokens, 1, config.hidden_size, requires_grad=True)
    sequences = PackedSequences.of(
        torch.arange(num_tokens), torch.tensor([0, num_tokens], dtype=torch.int32), trainer.model.rope_tables
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.model.decoder.layers[1](hidden_states=hidden, attention_mask=None, packed_seq_params=sequences)
    for tensor in not_counted:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    layer = config.layers[1]
    query, key = layer.mixer.query_size, layer.mixer.kv_size
    residuals_and_norms = 4 * config.hidden_size
    attention = (2 * query + query + layer.mixer.num_heads) + (2 * key + key)  # before and after rope; out, lse; value
    mlp = 2 * layer.mlp.ffn_hidden_size
    expected = config.hidden_size if recompute else residuals_and_norms + attention + mlp
    assert sum(size for size, _ in kept.values()) == num_tokens * expected
