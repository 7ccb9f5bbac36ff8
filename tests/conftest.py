"""Test set-up: numerics; without a GPU the Triton kernels run in Triton's interpreter, chosen before its import."""

import os
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from lockstep.kernels import numerics  # noqa: E402

numerics.set_up("cuda" if ON_GPU else "cpu")  # before the first matrix product of the process

torch.set_num_threads(min(2, os.cpu_count() or 1))


# Folders and files that train, start processes, or run many Triton kernels in the interpreter: `-m "not slow"` leaves
# them out (make test-fast).
SLOW = (
    "parity",
    "kernels",
    "gpu",
    "engine/test_replicated_engine.py",
    "engine/models/test_sharding.py",
    "engine/ranks/test_tensor_parallel.py",
    "recipes/bench/test_bench.py",
    "recipes/cluster/test_cluster.py",
    "recipes/drafts/test_draft.py",
    "recipes/drafts/test_draft_judge.py",
    "recipes/rl/test_dynamic_sampling.py",
    "recipes/rl/test_environment_failures.py",
    "recipes/planning/test_fit.py",
    "recipes/runs/test_kills.py",
    "recipes/rl/test_learner.py",
    "recipes/cluster/test_ray_session.py",
    "recipes/cluster/test_remote_rewards.py",
    "recipes/test_readme.py",
    "recipes/evaluation/test_replay.py",
    "recipes/runs/test_resume.py",
    "recipes/test_reward.py",
    "recipes/rl/test_rl.py",
    "recipes/drafts/test_rl_draft.py",
    "recipes/runs/test_run_directory.py",
    "recipes/runs/test_runs.py",
    "recipes/rl/test_verifier_failures.py",
    "rollout/environments/test_own_process.py",
    "rollout/rewards/test_code.py",
    "rollout/rewards/test_isolation.py",
    "rollout/rewards/test_system_calls.py",
    "rollout/test_reasoning_gym_verifier.py",
    "rollout/test_tasks.py",
    "test_docs.py",
    "trainer_bridge/drafts/test_draft_trainer.py",
    "trainer_bridge/algorithms/test_losses_trl.py",
    "trainer_bridge/megatron/test_parallel_trainer.py",
    "trainer_bridge/megatron/test_scalar_head.py",
    "trainer_bridge/test_trainer.py",
    "trainer_bridge/megatron/test_trainer_checkpoint.py",
    "trainer_bridge/megatron/test_trainer_model.py",
    "trainer_bridge/transports/test_transports.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--shape",
        default="qwen3-0.6b",
        help="model of the GPU tests: qwen3-0.6b, qwen3-1.7b, qwen3-8b, deepseek-mla; small also runs on a CPU",
    )
    parser.addoption("--kills", type=int, default=1, help="runs that test_kills.py kills at random moments")


def pytest_collection_modifyitems(config, items):
    root = Path(__file__).parent
    for item in items:
        if item.path.relative_to(root).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    runs_on_a_cpu = config.getoption("--shape") == "small"
    for item in items:
        if item.get_closest_marker("gpu") and not (runs_on_a_cpu and "setup" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
