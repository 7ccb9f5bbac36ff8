"""The order in which pipeline ranks work through micro-batches, and what they send each other.

Megatron's own schedules allocate on CUDA devices and expect one length for all micro-batches, or negotiate it at each
send. Here every rank knows the lengths, and derives the same plan of the whole pipeline from three numbers: one forward
and one backward alternate (1F1B), with virtual stages interleaved. The plan fixes the order of all sends between two
ranks, so that sends and receives meet in order, and a backward pass of a stage always comes in the order of the
micro-batches, so that gradients are summed in the order of a single rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist

from lockstep.trainer_bridge.megatron.parallel import RankAxis


@dataclass(frozen=True)
class StageAction:
    """One pass of one stage of the model over one micro-batch."""

    kind: Literal["forward", "backward"]
    stage: int
    micro_batch: int


class StageMessage(NamedTuple):
    """What the stage `to` is sent for a micro-batch: hidden states, their gradient, or the tied head's gradient."""

    kind: Literal["hidden", "gradient", "head_gradient"]
    to: int
    micro_batch: int


class Stages(Protocol):
    """A rank's work; `stage` is always one of its own."""

    def forward(self, stage: int, micro_batch: int, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """hidden [T, 1, H] of the stage before (None on the first) -> hidden for the next (None on the last)."""

    def backward(
        self, stage: int, micro_batch: int, gradient: torch.Tensor | None, head_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradient of what `forward` gave (None on the last stage) -> of what it was given (None on the first).

        The second of each is the tied head's gradient, which the last stage gives and the first one takes.
        """


def make_plan(
    num_ranks: int, chunks_per_rank: int, num_micro_batches: int, forward_only: bool = False
) -> list[list[StageAction | None]]:
    """plan[t][rank]: what each rank does at time t, if all actions took equally long. Stage s is on rank s % num_ranks.

    A rank prefers a backward pass that is ready. Before its first one it makes as many forward passes as Megatron's
    schedules do, which bounds the activations that it holds; forward passes come in groups of num_ranks micro-batches
    per chunk.
    """
    progress = _Progress(num_ranks, chunks_per_rank, num_micro_batches)
    total = num_ranks * chunks_per_rank * num_micro_batches * (1 if forward_only else 2)
    plan: list[list[StageAction | None]] = []
    while len(progress.done) < total:
        slot = [progress.next_action(rank, forward_only) for rank in range(num_ranks)]
        if not any(slot):
            # The bound is a wish; without one of these passes nothing would go on.
            slot = [progress.ready_forward(rank) for rank in range(num_ranks)]
        progress.add(slot)
        plan.append(slot)
    return plan


class _Progress:
    """What the ranks have done so far, and what each of them could do next."""

    def __init__(self, num_ranks: int, chunks_per_rank: int, num_micro_batches: int):
        self.done: set[StageAction] = set()
        self._num_ranks, self._num_micro_batches = num_ranks, num_micro_batches
        self._last_stage = num_ranks * chunks_per_rank - 1
        self._forwards = [
            _forward_order(rank, num_ranks, chunks_per_rank, num_micro_batches) for rank in range(num_ranks)
        ]
        self._limits = [_most_in_flight(rank, num_ranks, chunks_per_rank) for rank in range(num_ranks)]
        self._in_flight = [0] * num_ranks
        self._next_backward = [0] * (num_ranks * chunks_per_rank)

    def next_action(self, rank: int, forward_only: bool) -> StageAction | None:
        """A backward pass that is ready, or else a forward pass, if not too many are in flight."""
        if forward_only:
            return self.ready_forward(rank)
        is_full = self._in_flight[rank] >= self._limits[rank]
        return self._ready_backward(rank) or (None if is_full else self.ready_forward(rank))

    def ready_forward(self, rank: int) -> StageAction | None:
        if not self._forwards[rank]:
            return None
        action = self._forwards[rank][0]
        before = StageAction("forward", action.stage - 1, action.micro_batch)
        return action if action.stage == 0 or before in self.done else None

    def _ready_backward(self, rank: int) -> StageAction | None:
        last = self._last_stage
        for stage in range(last - (last - rank) % self._num_ranks, -1, -self._num_ranks):
            m = self._next_backward[stage]
            needed = StageAction("forward", stage, m) if stage == last else StageAction("backward", stage + 1, m)
            if m < self._num_micro_batches and needed in self.done:
                return StageAction("backward", stage, m)
        return None

    def add(self, slot: Sequence[StageAction | None]) -> None:
        """Counts what the ranks do at one time as done."""
        for rank, action in enumerate(slot):
            if action is None:
                continue
            if action.kind == "forward":
                self._forwards[rank].pop(0)
                self._in_flight[rank] += 1
            else:
                self._next_backward[action.stage] += 1
                self._in_flight[rank] -= 1
            self.done.add(action)


def _forward_order(rank: int, num_ranks: int, chunks_per_rank: int, num_micro_batches: int) -> list[StageAction]:
    return [
        StageAction("forward", chunk * num_ranks + rank, micro_batch)
        for first in range(0, num_micro_batches, num_ranks)
        for chunk in range(chunks_per_rank)
        for micro_batch in range(first, min(first + num_ranks, num_micro_batches))
    ]


def _most_in_flight(rank: int, num_ranks: int, chunks_per_rank: int) -> int:
    if chunks_per_rank == 1:
        return num_ranks - rank
    return (num_ranks - rank - 1) * 2 + (chunks_per_rank - 1) * num_ranks + 1


def run(
    plan: Sequence[Sequence[StageAction | None]],
    num_stages: int,
    ranks: RankAxis,
    stages: Stages,
    empty: Callable[[StageMessage], torch.Tensor],
    tied_head: bool,
) -> None:
    """Does this rank's part of the plan.

    empty: a tensor of the shape and dtype of a message's, on the right device, to receive it. tied_head: the first and
    the last stage share a weight, so the last one's gradient of it goes to the first.
    Each send and receive waits at most the group's timeout.
    """
    received: dict[StageMessage, tuple[torch.Tensor, list[dist.Work]]] = {}
    sent: list[tuple[torch.Tensor, list[dist.Work]]] = []

    def take(kind: str, action: StageAction, expected: bool) -> torch.Tensor | None:
        if not expected:
            return None
        tensor, works = received.pop(StageMessage(kind, action.stage, action.micro_batch))
        for work in works:
            work.wait()
        return tensor

    for slot in plan:
        outgoing: dict[StageMessage, torch.Tensor] = {}
        action = slot[ranks.rank]
        if action is not None:
            stage, m = action.stage, action.micro_batch
            if action.kind == "forward":
                hidden = take("hidden", action, stage > 0)
                outgoing[StageMessage("hidden", stage + 1, m)] = stages.forward(stage, m, hidden)
            else:
                gradient = take("gradient", action, stage < num_stages - 1)
                head_gradient = take("head_gradient", action, stage == 0 and tied_head)
                results = stages.backward(stage, m, gradient, head_gradient)
                outgoing[StageMessage("gradient", stage - 1, m)], outgoing[StageMessage("head_gradient", 0, m)] = (
                    results
                )
        for sender, message in _messages(slot, num_stages, tied_head):
            receiver = message.to % ranks.size
            if sender == ranks.rank:
                tensor = outgoing[message]
                sent.append((tensor, _exchange(dist.isend, tensor, receiver, ranks)))
            elif receiver == ranks.rank:
                tensor = empty(message)
                received[message] = tensor, _exchange(dist.irecv, tensor, sender, ranks)
    for _, works in sent:
        for work in works:
            work.wait()


def _messages(
    slot: Sequence[StageAction | None], num_stages: int, tied_head: bool
) -> Iterator[tuple[int, StageMessage]]:
    """(sending rank, message) of all that a slot's actions give, in the same order on all ranks."""
    for rank, action in enumerate(slot):
        if action is None:
            continue
        if action.kind == "forward" and action.stage < num_stages - 1:
            yield rank, StageMessage("hidden", action.stage + 1, action.micro_batch)
        if action.kind == "backward" and action.stage > 0:
            yield rank, StageMessage("gradient", action.stage - 1, action.micro_batch)
            if tied_head and action.stage == num_stages - 1:
                yield rank, StageMessage("head_gradient", 0, action.micro_batch)


def _exchange(operation: Callable, tensor: torch.Tensor, peer: int, ranks: RankAxis) -> list[dist.Work]:
    return dist.batch_isend_irecv([dist.P2POp(operation, tensor, ranks.global_rank(peer), ranks.group)])
