"""Test set-up: numerics; without a GPU the Triton kernels run in Triton's interpreter, chosen before its import."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from lockstep.kernels import numerics  # noqa: E402

numerics.set_up("cuda" if ON_GPU else "cpu")  # before the first matrix product of the process

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_addoption(parser):
    parser.addoption(
        "--shape",
        default="qwen3-0.6b",
        help="model of the GPU tests: qwen3-0.6b, qwen3-1.7b, qwen3-8b, deepseek-mla; small also runs on a CPU",
    )
    parser.addoption("--kills", type=int, default=1, help="runs that test_kills.py kills at random moments")


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    runs_on_a_cpu = config.getoption("--shape") == "small"
    for item in items:
        if item.get_closest_marker("gpu") and not (runs_on_a_cpu and "setup" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
