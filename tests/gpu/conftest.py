"""What the GPU tests share: the model's shape, the machine, and requests of every kind."""

import random
from dataclasses import dataclass

import pytest
import torch
from gpu_setup import Setup, free_memory

from lockstep.engine import SamplingParams
from lockstep.engine.models.config import load_model_config
from lockstep.recipes.bench.shapes import SHAPES, write_model_directory

NUM_GROUPS, NUM_SAMPLES = 16, 16
NUM_SINGLES = 256


@pytest.fixture(autouse=True)
def freed_memory():
    yield
    free_memory()


@pytest.fixture(scope="session")
def setup(request, tmp_path_factory) -> Setup:
    shape = request.config.getoption("--shape")
    if shape not in SHAPES:
        raise pytest.UsageError(f"--shape {shape}: known are {', '.join(SHAPES)}")
    path = write_model_directory(shape, tmp_path_factory.mktemp("model"))
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    config = load_model_config(path)
    return Setup(shape, path, device, dtype, config.vocab_size, config.max_position_embeddings)


@dataclass(frozen=True)
class Workload:
    prompts: list[list[int]]
    params: list[SamplingParams]

    def first(self, count: int) -> "Workload":
        return Workload(self.prompts[:count], self.params[:count])


@pytest.fixture(scope="session")
def workload(setup) -> Workload:
    """512 requests in random order: groups of samples of one prompt, and prompts of many lengths of their own."""
    rng = random.Random(0)
    longest = min(3000, setup.longest - 64)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(setup.vocab_size) for _ in range(length)]

    shared = [prompt(rng.choice([1, 63, 64, 65, 200, 400, 511])) for _ in range(NUM_GROUPS)]
    prompts = [list(p) for p in shared for _ in range(NUM_SAMPLES)]
    # Half of the others go on from a prompt of a group, as a second turn does.
    for index in range(NUM_SINGLES):
        base = rng.choice(shared) if index % 2 else []
        prompts.append((base + prompt(rng.choice([1, 3, 17, 64, 130, 300])))[:longest])
    prompts[-1] = prompt(longest)
    rng.shuffle(prompts)
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 32),
            temperature=rng.choice([1.0, 1.0, 0.7, 0.0]),
            top_p=rng.choice([1.0, 1.0, 1.0, 0.9]),
            top_k=rng.choice([-1, -1, -1, 50]),
            seed=rng.randrange(2**40),
            ignore_eos=True,
        )
        for _ in prompts
    ]
    return Workload(prompts, params)
