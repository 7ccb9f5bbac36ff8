"""What the trainer ranks of test_publish_layouts.py do: in one layout after another they train and send their parts."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from parallel_trainer import new_trainer, trainer_config

from lockstep.engine.models.config import load_model_config
from lockstep.trainer_bridge import MegatronTrainer
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.megatron.layout import trainer_layout
from lockstep.trainer_bridge.packing import TrainSequence, pack
from lockstep.trainer_bridge.transports.distributed import DistributedTransport, join_group
from lockstep.trainer_bridge.weight_plan import engine_layout, plan_transfers

NUM_TRAINER_RANKS = 4
TRAINERS = {
    "TP1": {},
    "TP2": {"tensor_parallel_size": 2},
    "PP2": {"pipeline_parallel_size": 2},
    "EP2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "TP2 x PP2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}  # the ranks that are left over are data parallel
TIMEOUT_S = 300.0


def trained(model_dir: str, options: dict, version: int) -> MegatronTrainer:
    """A trainer of this process's world after one step, which is another one for each version."""
    trainer = new_trainer(model_dir, **options)
    generator = torch.Generator().manual_seed(version)
    training = [
        TrainSequence(torch.randint(0, 132, (20,), generator=generator).tolist(), [False] + 19 * [True], 1.0 - i / 3)
        for i in range(4)
    ]
    trainer.step(pack(training, 20), sft_loss)
    return trainer


def make_transport(model_dir: str, trainer_name: str, group: dist.ProcessGroup) -> DistributedTransport:
    """From the ranks 0 to 3 of the group to an engine of its last one."""
    model = load_model_config(model_dir)
    sizes = trainer_config(model_dir, **TRAINERS[trainer_name]).parallel_sizes(NUM_TRAINER_RANKS)
    plan = plan_transfers(trainer_layout(model, sizes), engine_layout(model))
    itemsizes = dict.fromkeys((transfer.name for transfer in plan), 4)
    ranks = (range(NUM_TRAINER_RANKS), [NUM_TRAINER_RANKS])
    return DistributedTransport(plan, ranks, itemsizes, torch.device("cpu"), group, 50_000, TIMEOUT_S)


def new_group(store: str, rank: int) -> dist.ProcessGroup:
    size = NUM_TRAINER_RANKS + 1
    return join_group(dist.FileStore(store, size), rank, size, torch.device("cpu"), TIMEOUT_S)


def send_from_all_layouts(model_dir: str, store: str, num_engines: int) -> list[str]:
    """Sends version 1 from the first layout, and so on, each to so many engines. Returns the weights' hashes."""
    group = new_group(store, dist.get_rank())
    hashes = []
    for version, (name, options) in enumerate(TRAINERS.items(), 1):
        parallel_state.destroy_model_parallel()
        trainer = trained(model_dir, options, version)
        transport = make_transport(model_dir, name, group)
        hashes.append(trainer.weights_hash())
        for _ in range(num_engines):
            transport.send(dict(trainer.named_weights()), version)
    return hashes
