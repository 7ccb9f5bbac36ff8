"""Promise 2: trainer = engine, bit for bit: generation, scoring and training agree before and after updates."""

import functools
import random

import pytest
import torch
from models import EXPERTS, make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig, publish, share_weights
from lockstep.trainer_bridge.algorithms.losses import grpo_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

MODELS = {
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2-experts": ("deepseek_v2", {**EXPERTS, "topk_method": "group_limited_greedy"}),
    "deepseek_v3-experts": ("deepseek_v3", EXPERTS),
    "deepseek_v3-whole-queries-yarn": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
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
    "llama": ("llama", {}),
    "llama-mha-tied-biases": (
        "llama",
        {"num_key_value_heads": 4, "tie": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2-bias": ("qwen2", {}),
    "qwen2-tied-mqa": ("qwen2", {"num_key_value_heads": 1, "tie": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie": True}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-dense-layer-normalized": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True, "tie": True}),
}


def random_prompts(rng: random.Random, count: int) -> list[list[int]]:
    return [[rng.randrange(1, 131) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def assert_equal_everywhere(engine: Engine, trainer: MegatronTrainer, outputs: list) -> None:
    """Generation's log-probs == engine.score == trainer.logprobs, as floats, for every generated token."""
    sequences = [output.prompt_ids + output.token_ids for output in outputs]
    scored, trained = engine.score(sequences), trainer.logprobs(sequences)
    for output, by_engine, by_trainer in zip(outputs, scored, trained, strict=True):
        assert by_engine == by_trainer
        assert by_engine[len(output.prompt_ids) :] == output.logprobs


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_agree_before_and_after_updates(name, tmp_path):
    family, overrides = MODELS[name]
    make_hf_model(tmp_path / "model", family, seed=3, **overrides)
    model = str(tmp_path / "model")
    engine = Engine(EngineConfig(model=model, max_prefill_tokens=48))
    trainer = MegatronTrainer(TrainerConfig(model=model, learning_rate=1e-2))
    rng = random.Random(0)
    for version in range(1, 4):
        prompts = random_prompts(rng, 8)
        params = [SamplingParams(max_tokens=30, seed=rng.randrange(2**40), ignore_eos=True) for _ in prompts]
        outputs = engine.generate(prompts, params)
        assert all(set(output.weight_versions) == {version - 1} for output in outputs)
        assert_equal_everywhere(engine, trainer, outputs)

        stats = trainer.step(training_batches(outputs, rng), functools.partial(grpo_loss, clip_low=0.2, clip_high=0.2))
        assert stats["logprob_diff_max"] == 0.0
        before = engine.score([outputs[0].prompt_ids + outputs[0].token_ids])
        publish(trainer, engine, version=version)
        assert engine.score([outputs[0].prompt_ids + outputs[0].token_ids]) != before, "the update changed nothing"


def training_batches(outputs: list, rng: random.Random) -> list:
    sequences = [
        TrainSequence(
            token_ids=output.prompt_ids + output.token_ids,
            loss_mask=[False] * len(output.prompt_ids) + [True] * len(output.token_ids),
            advantage=rng.gauss(0.0, 1.0),
            logprobs=output.logprobs,
        )
        for output in outputs
    ]
    return pack(sequences, max_tokens=200)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_agree_at_other_temperatures(temperature, tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=4)
    engine = Engine(EngineConfig(model=str(tmp_path)))
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path)))
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=11, ignore_eos=True)
    (output,) = engine.generate([[3, 1, 4, 1, 5]], params)
    sequence = output.prompt_ids + output.token_ids
    assert trainer.logprobs([sequence], temperature)[0][5:] == output.logprobs
    assert engine.score([sequence], temperature)[0][5:] == output.logprobs


def test_a_published_engine_equals_one_loaded_from_the_export(tmp_path):
    make_hf_model(tmp_path / "model", "qwen2", seed=5)
    engine = Engine(EngineConfig(model=str(tmp_path / "model")))
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path / "model"), learning_rate=1e-2))
    outputs = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=20, n=4, seed=1, ignore_eos=True))
    trainer.step(training_batches(outputs, random.Random(0)), grpo_loss)
    report = publish(trainer, engine, version=1)
    trainer.export_hf(str(tmp_path / "export"))
    reloaded = Engine(EngineConfig(model=str(tmp_path / "export")))
    for name, tensor in reloaded.weight_targets.items():
        assert torch.equal(tensor, engine.weight_targets[name]), name
    assert report["version"] == engine.weight_version == 1


def test_an_engine_that_shares_the_trainers_weights_gives_the_bits_of_one_that_copies_them(tmp_path):
    make_hf_model(tmp_path / "model", "qwen3", seed=5)
    copying, sharing = (Engine(EngineConfig(model=str(tmp_path / "model"))) for _ in range(2))
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path / "model"), learning_rate=1e-2))
    share_weights(trainer, sharing, version=1)
    publish(trainer, copying, version=1)
    for name, tensor in trainer.named_weights():
        assert sharing.weight_targets[name].data_ptr() == tensor.data_ptr()
    params = SamplingParams(max_tokens=20, n=4, seed=1, ignore_eos=True)
    for version in (2, 3):
        outputs = copying.generate([[1, 2, 3]], params)
        assert [(o.token_ids, o.logprobs) for o in sharing.generate([[1, 2, 3]], params)] == [
            (o.token_ids, o.logprobs) for o in outputs
        ]
        trainer.step(training_batches(outputs, random.Random(0)), grpo_loss)
        with pytest.raises(RuntimeError, match=f"changed since version {version - 1} was published"):
            sharing.generate([[1, 2, 3]], params)
        for engine in (copying, sharing):
            publish(trainer, engine, version=version)
    (output,) = sharing.generate([[7, 8]], SamplingParams(max_tokens=10, seed=3, ignore_eos=True))
    assert set(output.weight_versions) == {3}
    assert trainer.logprobs([output.prompt_ids + output.token_ids])[0][2:] == output.logprobs
    with pytest.raises(ValueError, match="it takes no others"):
        sharing.update_weights([(n, t.clone()) for n, t in trainer.named_weights()], version=4)
