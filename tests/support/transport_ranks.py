"""What the ranks of test_transports.py do, each in its own process: trainer ranks 0 and 1, engine ranks 2 and 3."""

import os

import pytest
import torch
import torch.distributed as dist
from layouts import local_tensors

from lockstep.engine import Engine, EngineConfig
from lockstep.engine.models.config import load_model_config
from lockstep.engine.weights.staging import WeightUpdate, new_buffers
from lockstep.trainer_bridge.transports import messages, transport
from lockstep.trainer_bridge.transports.distributed import join_group
from lockstep.trainer_bridge.transports.transport import BucketTransport
from lockstep.trainer_bridge.weight_plan import engine_layout, plan_transfers

LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]
TIMEOUT_S = 20.0


def weights_of(model: str, seed: int) -> dict[str, torch.Tensor]:
    engine = Engine(EngineConfig(model=model))
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in engine.weight_targets.items()}


def new_update(shards, values, version=1) -> WeightUpdate:
    targets = local_tensors(shards, values)
    return WeightUpdate(version, targets, new_buffers(targets))


def arrived(update: WeightUpdate, shards, values) -> bool:
    update.check_complete()
    expected = local_tensors(shards, values)
    return all(torch.equal(update.tensors[name], tensor) for name, tensor in expected.items())


def run_rank(rank: int, kind: type[BucketTransport], model: str, store: str) -> None:
    torch.set_num_threads(1)
    group = join_group(dist.FileStore(store, 4), rank, 4, torch.device("cpu"), TIMEOUT_S)
    config, values = load_model_config(model), weights_of(model, 5)
    for senders, receivers in LAYOUTS:
        _exchange(kind, group, config, values, senders, receivers)
    _faults(kind, group, config, values)
    _death(kind, group, config, values)


def _transport(kind, group, config, senders, receivers, timeout_s=TIMEOUT_S):
    """Trainer ranks are 0 and 1 of the group, engine ranks 2 and 3."""
    sources, targets = engine_layout(config, senders), engine_layout(config, receivers)
    plan = plan_transfers(sources, targets)
    itemsizes = dict.fromkeys((t.name for t in plan), 4)
    ranks = (range(senders), range(2, 2 + receivers))
    end = kind(plan, ranks, itemsizes, torch.device("cpu"), group, bucket_bytes=20_000, timeout_s=timeout_s)
    return sources, targets, end


def _exchange(kind, group, config, values, senders, receivers):
    rank = group.rank()
    sources, targets, end = _transport(kind, group, config, senders, receivers)
    for version in (1, 2):
        if rank < senders:
            end.send(local_tensors(sources[rank], values), version)
        elif rank >= 2 and rank - 2 in targets:
            update = new_update(targets[rank - 2], values, version)
            end.receive(update)
            assert arrived(update, targets[rank - 2], values)


def _faults(kind, group, config, values):
    """A missing tensor, damaged bytes, another version: all named; and the transport serves the next update."""
    rank = group.rank()
    sources, targets, end = _transport(kind, group, config, 2, 2)
    lost = "decoder.layers.1.mlp.linear_fc2.weight"
    if rank < 2:
        tensors = local_tensors(sources[rank], values)
        kept = {name: tensor for name, tensor in tensors.items() if name != lost}
        with pytest.raises(ValueError, match=f"no tensor {lost}"):
            end.send(kept, 1)
        pack = messages.pack
        messages.pack = _damaging(pack)
        end.send(tensors, 2)
        messages.pack = pack
        end.send(tensors, 4)
        end.send(tensors, 4)
    else:
        for version, message in (
            (1, f"gave up: rank . has no tensor {lost}"),
            (2, "damaged on its way"),
            (3, "of version 4"),
        ):
            with pytest.raises((ValueError, RuntimeError), match=message):
                end.receive(new_update(targets[rank - 2], values, version))
        update = new_update(targets[rank - 2], values, 4)
        end.receive(update)
        assert arrived(update, targets[rank - 2], values)


def _damaging(pack):
    def damage(bucket, tensors, buffer):
        hashes = pack(bucket, tensors, buffer)
        buffer[bucket.offsets[-1]] ^= 1
        return hashes

    return damage


def _death(kind, group, config, values):
    rank = group.rank()
    sources, targets, end = _transport(kind, group, config, 2, 2, timeout_s=5.0)
    if rank == 1:
        write = transport.write
        written = []

        def die_in_the_middle(*args):
            written.append(1)
            if len(written) == 4:
                os._exit(7)
            write(*args)

        transport.write = die_in_the_middle
    if rank < 2:
        end.send(local_tensors(sources[rank], values), 1)
        return
    update = new_update(targets[rank - 2], values)
    if rank == 2:  # served first, it has all that it needs of rank 1 by then
        end.receive(update)
        assert arrived(update, targets[0], values)
        return
    with pytest.raises((TimeoutError, ConnectionError), match="from rank 1"):
        end.receive(update)
    with pytest.raises(RuntimeError, match="this transport broke"):
        end.receive(update)
    with pytest.raises(ValueError, match="incomplete"):
        update.check_complete()
