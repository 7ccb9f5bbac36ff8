"""GRPOTrainer's loss of TRL, where it is installed, against ours: the same formula in another's hands.

TRL is no dependency: `pip install trl accelerate` beside the repository runs this.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lockstep.trainer_bridge.algorithms.algorithms import build_algorithm
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig
from lockstep.trainer_bridge.packing import TrainSequence, pack

pytest.importorskip("accelerate")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

LENGTHS = (5, 2, 7, 1)
MAX_TOKENS = 8


def trl_loss(loss_type, level, epsilons, beta, entropy_coefficient, columns):
    """(loss, gradient) of GRPOTrainer._compute_loss for given log-probabilities [B, T] and mask."""
    trainer = object.__new__(grpo_trainer.GRPOTrainer)
    trainer.__dict__ |= {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": epsilons[0],
        "epsilon_high": epsilons[1],
        "beta": beta,
        "max_completion_length": MAX_TOKENS,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": entropy_coefficient != 0.0,
        "entropy_coef": entropy_coefficient,
        "use_adaptive_entropy": False,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, device=torch.device("cpu")
        ),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
    }
    logprobs = columns["logprobs"].clone().requires_grad_()
    entropies = columns["entropies"]
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, entropies, None)
    mask = columns["mask"]
    inputs = {
        "prompt_ids": torch.ones(len(LENGTHS), 2, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.int64),
        "completion_ids": mask.long(),
        "completion_mask": mask.long(),
        "advantages": columns["advantages"],
        "old_per_token_logps": columns["old"],
        "ref_per_token_logps": columns["ref"],
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    return loss.item(), logprobs.grad


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "loss_type", "level", "epsilons"),
    [
        ("grpo", "grpo", "token", (0.2, 0.2)),
        ("dr_grpo", "dr_grpo", "token", (0.2, 0.2)),
        ("dapo", "dapo", "token", (0.2, 0.28)),
        ("gspo", "grpo", "sequence", (3e-4, 4e-4)),
        ("cispo", "cispo", "token", (0.2, 5.0)),
    ],
)
def test_losses_equal_trls(name, loss_type, level, epsilons, beta):
    generator = torch.Generator().manual_seed(3)
    shape = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    old = -2 * torch.rand(shape, generator=generator) - 0.1
    columns = {
        "mask": mask,
        "old": old,
        "logprobs": old + 0.3 * torch.randn(shape, generator=generator),
        "ref": old + 0.3 * torch.randn(shape, generator=generator),
        "entropies": torch.rand(shape, generator=generator),
        "advantages": torch.tensor([1.2, -0.4, 0.3, -1.1]),
    }
    expected, expected_gradient = trl_loss(loss_type, level, epsilons, beta, 0.0, columns)

    algorithm = build_algorithm(AlgorithmConfig(name=name, kl_coefficient=beta), MAX_TOKENS)
    sequences = [
        TrainSequence(
            token_ids=[1] * (n + 1),
            loss_mask=[False] + [True] * n,
            advantage=columns["advantages"][i].item(),
            logprobs=old[i, :n].tolist(),
            ref_logprobs=columns["ref"][i, :n].tolist(),
        )
        for i, n in enumerate(LENGTHS)
    ]
    (batch,) = pack(sequences, 1000, algorithm.config.aggregation, length=MAX_TOKENS)
    logprobs = torch.zeros(len(batch.token_ids))
    rows = batch.weights > 0
    logprobs[rows] = columns["logprobs"][mask]
    logprobs.requires_grad_()
    loss = (algorithm.loss(logprobs, batch)[0] * batch.weights).sum()
    loss.backward()
    # Two float32 sums in different orders.
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(logprobs.grad[rows], expected_gradient[mask], rtol=1e-5, atol=1e-6)
