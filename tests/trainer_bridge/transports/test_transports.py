"""Transports: whatever the layouts, every engine tensor arrives bit for bit, or the old version serves on."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layouts import local_tensors
from models import make_hf_model
from transport_ranks import LAYOUTS, arrived, new_update, run_rank, weights_of

from lockstep.engine import Engine, EngineConfig
from lockstep.engine.models.config import load_model_config
from lockstep.engine.weights.checksums import hashes_by_name
from lockstep.trainer_bridge.transports.buckets import buckets
from lockstep.trainer_bridge.transports.cuda_ipc import CudaIpcTransport
from lockstep.trainer_bridge.transports.disk import DiskTransport
from lockstep.trainer_bridge.transports.distributed import DistributedTransport, join_group
from lockstep.trainer_bridge.weight_plan import engine_layout, plan_transfers, volume


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen2", seed=1, vocab_size=132)  # has biases
    return str(path)


# Buckets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [64, 1000, 10**9])
def test_buckets_hold_every_element_once_and_keep_their_size(model, max_bytes):
    config = load_model_config(model)
    plan = plan_transfers(engine_layout(config, 2), engine_layout(config, 1))
    parts = buckets(plan, dict.fromkeys((t.name for t in plan), 4), max_bytes)
    assert sum(t.num_elements for part in parts for t in part.transfers) == sum(t.num_elements for t in plan)
    for part in parts:
        assert part.num_bytes <= max_bytes + 16 or len(part.transfers) == 1
        for transfer, offset in zip(part.transfers, part.offsets, strict=True):
            assert offset % 16 == 0
            assert offset + volume(transfer.source) * 4 <= part.num_bytes
            assert volume(transfer.source) == volume(transfer.target)


# Disk -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("senders", "receivers"), LAYOUTS)
def test_disk_brings_every_element(model, tmp_path, senders, receivers):
    config, values = load_model_config(model), weights_of(model, 3)
    sources, targets = engine_layout(config, senders), engine_layout(config, receivers)
    plan = plan_transfers(sources, targets)

    def end(rank: int) -> DiskTransport:
        return DiskTransport(plan, tmp_path, rank, keep=1)

    for version in (1, 2):
        for rank in reversed(range(senders)):  # rank 0 last: its barrier
            end(rank).send(local_tensors(sources[rank], values), version)
        for rank in range(receivers):
            update = new_update(targets[rank], values, version)
            end(rank).receive(update)
            assert arrived(update, targets[rank], values)
    assert [path.name for path in tmp_path.iterdir()] == ["weights-2"]


@dataclass
class DiskScene:
    transport: DiskTransport
    engine: Engine
    before: dict[str, int]
    file: Path

    def refuses(self, error, message):
        with pytest.raises(error, match=message):
            self.transport.receive(self.engine.begin_update(1))
        assert self.engine.weight_version == 0
        assert hashes_by_name(self.engine.weight_targets) == self.before


@pytest.fixture
def scene(model, tmp_path):
    config, values = load_model_config(model), weights_of(model, 4)
    layout = engine_layout(config, 1)
    transport = DiskTransport(plan_transfers(layout, layout), tmp_path, timeout_s=0.2)
    transport.send(values, 1)
    engine = Engine(EngineConfig(model=model))
    return DiskScene(transport, engine, hashes_by_name(engine.weight_targets), tmp_path / "weights-1" / "0.safetensors")


def test_an_engine_takes_an_update_from_disk(scene, model):
    update = scene.engine.begin_update(1)
    scene.transport.receive(update)
    report = scene.engine.commit_update(update)
    assert report["version"] == scene.engine.weight_version == 1
    assert hashes_by_name(scene.engine.weight_targets) == hashes_by_name(weights_of(model, 4))


def test_a_truncated_file_is_named(scene):
    scene.file.write_bytes(scene.file.read_bytes()[:-40])
    scene.refuses(ValueError, "0.safetensors is damaged")


def test_a_flipped_bit_names_the_tensor(scene):
    data = bytearray(scene.file.read_bytes())
    data[-9] ^= 4
    scene.file.write_bytes(data)
    scene.refuses(ValueError, "weight is damaged in .*0.safetensors")


def test_an_update_that_never_comes_is_a_timeout(scene):
    scene.file.parent.rename(scene.file.parent.with_name(".weights-1.partial"))  # the sender died before the rename
    scene.refuses(TimeoutError, "update 1 did not appear in .* within 0.2 s")


def test_what_a_killed_sender_left_is_replaced_and_other_names_are_left_alone(scene, model):
    folder = scene.file.parent.parent
    (folder / ".weights-1.partial").mkdir()
    for name in ("weights-1.bak", "weights-0 (copy)", "weights-2.tar.gz"):
        (folder / name).mkdir()
    scene.transport.send(weights_of(model, 5), 1)  # version 1 is there, of other weights
    for version in (2, 3, 4):
        scene.transport.send(weights_of(model, 6), version)
    left = {"weights-1.bak", "weights-0 (copy)", "weights-2.tar.gz"}
    assert {path.name for path in folder.iterdir()} == left | {"weights-3", "weights-4"}


def test_a_version_that_is_sent_again_is_the_one_that_arrives(scene, model):
    scene.transport.send(weights_of(model, 5), 1)
    update = scene.engine.begin_update(1)
    scene.transport.receive(update)
    scene.engine.commit_update(update)
    assert hashes_by_name(scene.engine.weight_targets) == hashes_by_name(weights_of(model, 5))


def test_a_sender_without_a_tensor_writes_nothing(scene, model):
    values = weights_of(model, 4)
    del values["decoder.final_layernorm.weight"]
    with pytest.raises(ValueError, match=r"no tensor decoder.final_layernorm.weight"):
        scene.transport.send(values, 2)
    assert not scene.file.parent.with_name("weights-2").exists()


# Buckets between processes --------------------------------------------------------------------------------------------


def test_a_group_that_nobody_else_joins_is_a_timeout_also_for_who_comes_later():
    store, started = dist.HashStore(), time.monotonic()
    for rank in (0, 1):
        with pytest.raises(TimeoutError, match=r"only 1 of 2 members .* within 0\.5 s"):
            join_group(store, rank, 2, torch.device("cpu"), timeout_s=0.5)
    assert time.monotonic() - started < 2.0


@pytest.mark.parametrize("kind", [DistributedTransport, CudaIpcTransport])
def test_bucket_transports_bring_every_element_and_survive_faults(kind, model, tmp_path):
    """Four processes, two of them trainer ranks; see transport_ranks.py."""
    context = mp.spawn(run_rank, args=(kind, model, str(tmp_path / "store")), nprocs=4, join=False)
    deadline = time.monotonic() + 240
    exited = set()
    while len(exited) < 4 and time.monotonic() < deadline:
        for rank, process in enumerate(context.processes):
            process.join(0.1)
            if process.exitcode is not None:
                exited.add(rank)
    codes = [process.exitcode for process in context.processes]
    for process in context.processes:
        process.kill()
    errors = [Path(queue).read_text() for queue in context.error_files if os.path.exists(queue)]
    # Rank 1 ends itself in the last scene.
    assert codes == [0, 7, 0, 0], "\n".join(errors)
