"""What a trainer is seen to do, of which tests compare the bits between layouts. In a module that ranks can import."""

import functools
from itertools import compress

import torch

from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import grpo_loss
from lockstep.trainer_bridge.megatron.layout import local_parts
from lockstep.trainer_bridge.megatron.training_state import TrainingState
from lockstep.trainer_bridge.packing import TrainSequence, pack

# Sums are cut alike in every layout of a case; the sequences make seven micro-batches.
SPLITS = {"row_parallel_splits": 2, "gradient_splits": 4}


LOSS = functools.partial(grpo_loss, kl_coefficient=0.1)


def trainer_config(model_dir, **options):
    # A small bound on the gradient norm, so that it takes part in every update.
    return TrainerConfig(
        model=str(model_dir),
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.1,
        max_tokens_per_micro_batch=48,
        rank_timeout_s=120,
        **{**SPLITS, **options},
    )


def new_trainer(model_dir, **options):
    return MegatronTrainer(trainer_config(model_dir, **options))


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 132, (n,), generator=generator).tolist() for n in (20, 33, 7, 41, 12, 28, 30, 44, 38, 1)]


def state_hash(trainer):
    return TrainingState(trainer.trained_model, trainer.optimizers).hash()


def batches(trainer, seed):
    tokens = sequences(seed)
    policy, reference = trainer.logprobs(tokens, 0.8), trainer.reference_logprobs(tokens, 0.8)
    training = []
    for i, t in enumerate(tokens):
        # Nothing of the last sequences is trained on: one of their micro-batches has nothing to do.
        mask = [False] + [i < 7 and t[j] % 5 != 0 for j in range(1, len(t))]
        old, ref = (list(compress(scores[i], mask)) for scores in (policy, reference))
        training.append(TrainSequence(t, mask, 1.0 - i / 3, old, ref))
    return pack(training, 48, temperature=0.8)


def exercise(model_dir, folder, options, other_checkpoint):
    """All that is compared between layouts. Two steps, with checkpoints after the first."""
    trainer = new_trainer(model_dir, **options)
    seen = {"first": trainer.logprobs(sequences(), 0.7), "hash": [trainer.weights_hash()], "stats": []}
    for step in range(2):
        if step == 1:
            trainer.save(folder / "checkpoint", metadata={"step": step})
        seen["stats"].append(trainer.step(batches(trainer, step), LOSS))
        seen["hash"].append(trainer.weights_hash())
    seen["last"] = trainer.logprobs(sequences(), 0.7)
    seen["weights"] = {name: tensor.clone() for name, tensor in trainer.whole_weights()}
    seen["state_hash"] = state_hash(trainer)
    trainer.export_hf(folder / "export")
    seen["local"] = [
        (name, torch.equal(part, tensor))
        for (name, tensor), (_, part) in zip(
            trainer.named_weights(), local_parts(trainer.local_layout(), seen["weights"].items()), strict=True
        )
    ]

    # Another trainer of this layout goes on from a checkpoint of another layout: it repeats the second step.
    resumed = new_trainer(model_dir, load_format="dummy", **options)
    seen["dummy_hash"] = resumed.weights_hash()
    seen["metadata"] = resumed.load(other_checkpoint or folder / "checkpoint")
    resumed.step(batches(resumed, 1), LOSS)
    seen["resumed_hash"] = resumed.weights_hash()
    return seen
