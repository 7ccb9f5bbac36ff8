"""Engine.reward: transformers' scores, the trainer's bits, whatever the batch; a shared prefix is computed once."""

import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.pooling import scored_part
from lockstep.engine.replicated_engine import ReplicatedEngine
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig

PREFIX = list(range(1, 50))


def random_sequences(seed=0):
    """Two groups with a prefix each, strangers, and a sequence that comes twice."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, 131, (n,), generator=generator).tolist() for n in (3, 20, 17, 64, 1, 90, 5, 31)]
    return [PREFIX + draw[0], PREFIX + draw[1], PREFIX, draw[3] + draw[4], draw[3] + draw[6], draw[4], draw[5], PREFIX]


def engine_of(path, **options):
    return Engine(EngineConfig(model=str(path), kv_cache_tokens=1024, **options))


@pytest.mark.parametrize(("family", "options"), [("llama", {"mlp_bias": True}), ("qwen3", {"tie": True})])
def test_rewards_are_transformers_scores_and_the_trainers_bits(family, options, tmp_path):
    hf = make_hf_model(tmp_path, family, seed=1, scalar_head=True, **options)
    sequences = random_sequences()
    rewards = engine_of(tmp_path).reward(sequences)
    with torch.no_grad():
        scores = [hf(torch.tensor([sequence])).logits.item() for sequence in sequences]
    assert rewards == pytest.approx(scores, abs=1e-4)
    assert len(set(rewards)) == len(sequences) - 1
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path), head="scalar"))
    assert rewards == [values[-1] for values in trainer.values(sequences)]


# Token 7 pads, in some cases; 0 ends.
ENDINGS = [
    [5, 6, 3],
    [5, 6, 0],
    [5, 6, 7],
    [5, 0, 7, 7],
    [5, 7, 0, 0],
    [7, 7, 5, 7],
    [0, 0, 0],
    [7, 7],
    [0],
    [3, 0, 5, 0],
]


@pytest.mark.parametrize("pad", [7, 0, None, -1], ids=["own", "eos", "none", "negative"])
def test_scores_are_read_where_transformers_reads_them(pad, tmp_path):
    hf = make_hf_model(tmp_path, "llama", seed=4, scalar_head=True, pad_token_id=pad)
    engine = engine_of(tmp_path)
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path), head="scalar"))
    with torch.no_grad():
        alone = [hf(torch.tensor([sequence])).logits.item() for sequence in ENDINGS]
        assert engine.reward(ENDINGS) == pytest.approx(alone, abs=1e-4)
        values = trainer.values([scored_part(sequence, pad) for sequence in ENDINGS])
        assert engine.reward(ENDINGS) == [row[-1] for row in values]
        last = [row[-1] for row in trainer.values(ENDINGS)]
        assert engine.reward(ENDINGS, score_at="last") == last
        assert (engine.reward(ENDINGS) == last) == (pad in (None, -1))
        if pad in (7, 0):  # transformers takes batches of such models alone
            padded = torch.tensor([[*sequence, *[pad] * (6 - len(sequence))] for sequence in ENDINGS])
            assert hf(padded).logits.squeeze(1).tolist() == pytest.approx(alone, abs=1e-4)


def test_an_unknown_place_of_the_score_is_refused(model_dir):
    with pytest.raises(ValueError, match="score_at must be one of last_non_pad, last, got 'first'"):
        engine_of(model_dir).reward([[1]], score_at="first")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward_model")
    make_hf_model(path, "qwen3", seed=2, scalar_head=True)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"max_running_requests": 1},
        {"max_prefill_tokens": 7, "page_size": 4},
        {"enable_prefix_cache": False},
        {"page_size": 4, "max_model_len": 96, "max_running_requests": 3},
    ],
)
def test_the_batch_changes_no_bit(model_dir, options):
    sequences = random_sequences(1)
    expected = engine_of(model_dir).reward(sequences)
    engine = engine_of(model_dir, **options)
    assert engine.reward(sequences) == expected
    assert engine.reward(sequences[::-1]) == expected[::-1]  # out of the cache, where there is one
    assert [engine.reward([sequence])[0] for sequence in sequences] == expected
    assert not engine.scheduler.has_work


def test_a_shared_prefix_is_computed_once(model_dir):
    engine = engine_of(model_dir, page_size=16)
    engine.reward([[*PREFIX, i, 2, 3] for i in range(8)])
    assert engine.stats()["computed_tokens"] == 52 + 7 * (52 - 48)
    engine.reward([PREFIX])
    assert engine.stats()["computed_tokens"] == 52 + 7 * (52 - 48) + 1


def test_replicas_give_the_same_rewards(model_dir):
    sequences = random_sequences(2)
    config = EngineConfig(model=str(model_dir), kv_cache_tokens=1024)
    assert ReplicatedEngine(config, 2).reward(sequences) == Engine(config).reward(sequences)


def test_impossible_requests_are_named(model_dir, tmp_path):
    engine = engine_of(model_dir, max_model_len=32)
    assert len(engine.reward([[5] * 32])) == 1
    for call, message in (
        (lambda: engine.reward([[5] * 33]), "33 tokens exceed max_model_len=32"),
        (lambda: engine.reward([[1], []]), "prompt 1: is empty"),
        (lambda: engine.reward([[131]]), "131 is outside the vocabulary"),
        (lambda: engine.generate([[1]], SamplingParams()), "has a scalar head, for Engine.reward only"),
        (lambda: engine.score([[1, 2]]), "has a scalar head, for Engine.reward only"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    make_hf_model(tmp_path / "lm", "llama", seed=1)
    with pytest.raises(ValueError, match="no scalar head"):
        engine_of(tmp_path / "lm").reward([[1, 2]])
    make_hf_model(tmp_path / "two", "llama", seed=1, scalar_head=True)
    config = tmp_path / "two" / "config.json"
    config.write_text(config.read_text().replace('"0": "LABEL_0"', '"0": "LABEL_0", "1": "LABEL_1"'))
    with pytest.raises(ValueError, match="num_labels = 2"):
        engine_of(tmp_path / "two")


def test_a_model_that_gives_no_number_is_named(model_dir, tmp_path):
    hf = make_hf_model(tmp_path, "llama", seed=1, scalar_head=True)
    with torch.no_grad():
        hf.score.weight.fill_(float("nan"))
    hf.save_pretrained(tmp_path)
    with pytest.raises(FloatingPointError, match="request 0"):
        engine_of(tmp_path).reward([[1, 2, 3]])
