"""Promise 5 under SIGKILL: at chosen moments, and at random ones (`--kills=20` for twenty of them)."""

import multiprocessing
import random
import signal
import time
from dataclasses import replace

import pytest
import short_runs

from lockstep.recipes.rl import rl
from lockstep.recipes.runs.run_directory import checkpoint_steps
from lockstep.rollout.config import BufferConfig

DEADLINE_S = 240
# Children are forked from a process that has imported everything and started no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["short_runs"])

CONFIGS = {
    "synchronous": lambda path: replace(short_runs.stale_config(path), buffer=BufferConfig(), keep_checkpoints=1),
    "stale": short_runs.stale_config,
}


def in_child(work, *arguments) -> multiprocessing.Process:
    process = CONTEXT.Process(target=work, args=arguments)
    process.start()
    return process


def end_of(process) -> int:
    process.join(DEADLINE_S)
    assert process.exitcode is not None, f"the run did not end within {DEADLINE_S} s"
    return process.exitcode


def final_hash(runs_dir) -> str:
    return (runs_dir / "short" / "weights.sha256").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(weights hash, seconds) by name of the config."""
    results = {}
    for name, config in CONFIGS.items():
        runs_dir = tmp_path_factory.mktemp(name)
        started = time.monotonic()
        assert end_of(in_child(rl.run, config(runs_dir))) == 0
        results[name] = final_hash(runs_dir), time.monotonic() - started
    assert results["synchronous"][0] != results["stale"][0]
    return results


@pytest.mark.parametrize(
    ("name", "function", "call"),
    [
        # While responses grow, some of which are in the checkpoint.
        ("stale", "lockstep.rollout.worker:RolloutWorker.extend", 7),
        # In a checkpoint, of which the trainer's part is there.
        ("stale", "lockstep.rollout.buffer:RolloutBuffer.save", 3),
        # In a publish.
        ("stale", "lockstep.engine.weights.served_weights:copy_in_place", 3),
        ("synchronous", "lockstep.trainer_bridge.trainer:MegatronTrainer.step", 3),
        # Between a checkpoint and the end of the one before.
        ("synchronous", "lockstep.recipes.runs.run_directory:RunDirectory._drop_old_checkpoints", 4),
    ],
)
def test_a_run_killed_in_the_middle_of_something_is_the_same_run(undisturbed, tmp_path, name, function, call):
    config = CONFIGS[name](tmp_path)
    assert end_of(in_child(short_runs.run_and_die, config, function, call)) == -signal.SIGKILL
    assert checkpoint_steps(tmp_path / "short"), "the kill came before there was anything to resume"
    assert end_of(in_child(rl.run, config)) == 0
    assert final_hash(tmp_path) == undisturbed[name][0]


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--kills")))


def test_a_run_killed_at_random_moments_is_the_same_run(undisturbed, tmp_path, number):
    """A run is killed once or twice, at moments spread over what it takes undisturbed."""
    draw = random.Random(number)
    name = ("stale", "synchronous")[number % 2]
    expected, seconds = undisturbed[name]
    config = CONFIGS[name](tmp_path)
    for _ in range(draw.choice([1, 2])):
        process = in_child(rl.run, config)
        time.sleep(draw.uniform(0.1, seconds))
        process.kill()
        assert end_of(process) in (0, -signal.SIGKILL)
    assert end_of(in_child(rl.run, config)) == 0
    assert final_hash(tmp_path) == expected
