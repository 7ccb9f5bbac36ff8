"""Checkpoints: a resumed trainer continues to the bit, and what cannot be restored is refused."""

import pytest
import torch
from models import EXPERTS, make_hf_model

from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

OPTIONS = {
    "learning_rate": 1e-2,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "total_steps": 9,
    "weight_decay": 0.1,
}


def new_trainer(model_dir, **options):
    return MegatronTrainer(TrainerConfig(model=str(model_dir), **{**OPTIONS, **options}))


def batches(seed):
    tokens = torch.randint(0, 131, (5, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    return pack([TrainSequence(t, [False] * 2 + [True] * 18) for t in tokens], 64)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("deepseek_v3", EXPERTS),
    ],
)
def test_resuming_continues_to_the_bit(tmp_path, family, options):
    make_hf_model(tmp_path / "model", family, seed=1, **options)
    trainer = new_trainer(tmp_path / "model")
    trainer.save(tmp_path / "checkpoints" / "0")
    first_hash = trainer.weights_hash()
    for seed in range(3):
        trainer.step(batches(seed), sft_loss)
    trainer.save(tmp_path / "checkpoints" / "3", metadata={"prompts_taken": 12, "names": ["a"]})
    saved_hash = trainer.weights_hash()
    continued = [trainer.step(batches(seed), sft_loss) for seed in range(3, 6)]

    resumed = new_trainer(tmp_path / "model", load_format="dummy")
    # A step of its own first: nothing of it may survive the load.
    resumed.step(batches(99), sft_loss)
    assert resumed.load(tmp_path / "checkpoints" / "3") == {"prompts_taken": 12, "names": ["a"]}
    assert resumed.step_count == 3
    assert resumed.weights_hash() == saved_hash
    assert [resumed.step(batches(seed), sft_loss) for seed in range(3, 6)] == continued
    assert resumed.weights_hash() == trainer.weights_hash()

    assert resumed.load(tmp_path / "checkpoints" / "0") == {}
    assert resumed.weights_hash() == first_hash
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["0", "3"]


@pytest.fixture
def saved(tmp_path):
    make_hf_model(tmp_path / "model", "llama", seed=1)
    trainer = new_trainer(tmp_path / "model")
    trainer.step(batches(0), sft_loss)
    trainer.save(tmp_path / "checkpoint")
    return trainer, tmp_path


def test_a_checkpoint_is_not_replaced(saved):
    trainer, path = saved
    with pytest.raises(FileExistsError):
        trainer.save(path / "checkpoint")


def test_an_interrupted_save_leaves_nothing_to_load(saved, monkeypatch):
    trainer, path = saved
    with monkeypatch.context() as patch:
        patch.setattr("lockstep.trainer_bridge.megatron.checkpoint.write_rank", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.save(path / "next")
    assert not (path / "next").exists()
    with pytest.raises(FileNotFoundError):
        trainer.load(path / "next")
    trainer.save(path / "next")
    new_trainer(path / "model").load(path / "next")


def test_damage_is_found(saved):
    trainer, path = saved
    (data,) = (path / "checkpoint").glob("*.safetensors")
    content = bytearray(data.read_bytes())
    weight = next(p for n, p in trainer.named_weights() if n.endswith("linear_fc2.weight")).contiguous()
    at = content.find(weight.view(torch.uint8).numpy().tobytes()[:32])
    assert at > 0
    content[at] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        new_trainer(path / "model").load(path / "checkpoint")


def test_another_models_checkpoint_is_refused_before_anything_changes(saved):
    _, path = saved
    make_hf_model(path / "wider", "llama", seed=1, intermediate_size=128)
    other = new_trainer(path / "wider")
    before = other.weights_hash()
    with pytest.raises(ValueError, match=r"of another model, with layers\.0\.mlp\.ffn_hidden_size 96 \(wanted: 128\)"):
        other.load(path / "checkpoint")
    assert other.weights_hash() == before
