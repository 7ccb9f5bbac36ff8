"""A trainer with a scalar head and what it learns from. In a module that ranks can import."""

import torch

from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.preference import PreferencePair, bradley_terry_loss, pack_pairs


def random_sequences(lengths=(20, 33, 7, 41, 12, 28), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths]


def pairs():
    sequences = random_sequences()
    return [PreferencePair(*pair) for pair in zip(sequences[::2], sequences[1::2], strict=True)]


def new_trainer(path, **options):
    options = {"head": "scalar", "learning_rate": 1e-2, "max_tokens_per_micro_batch": 64, **options}
    return MegatronTrainer(TrainerConfig(model=str(path), **options))


def exercise(model_dir, options):
    trainer = new_trainer(model_dir, row_parallel_splits=2, gradient_splits=2, rank_timeout_s=120, **options)
    stats = [trainer.step(pack_pairs(pairs(), 64), bradley_terry_loss) for _ in range(2)]
    return trainer.values(random_sequences()), stats, trainer.weights_hash()
