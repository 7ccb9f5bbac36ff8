"""Draft tokens after each token of given texts, unrolled as training-time test does, and how often they are accepted.

Step 0 reads the target's states. Step i + 1 reads what step i put out at the same row, one token later. Its attention
sees what draft token i + 1 would see (kernels.chain_attention).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lockstep.engine.models.eagle3 import Eagle3Draft
from lockstep.kernels.attention.chain_attention import chain_attention
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.norm_rope.rope import apply_rope
from lockstep.kernels.sampling.noise import gumbel_noise
from lockstep.trainer_bridge.drafts.draft_batch import DraftBatch, DraftSequence, check_sequence, pack_drafts
from lockstep.trainer_bridge.drafts.draft_loss import log_acceptance

ROWS_AT_ONCE = 1024  # bounds the logits


@dataclass(frozen=True)
class Targets:
    """Of N rows of the target: logits of the draft's tokens [N, draft vocabulary], log-sum-exp of all logits over the
    temperature fp32 [N], and whether the draft has the likeliest token, bool [N]."""

    logits: torch.Tensor
    lse: torch.Tensor
    covered: torch.Tensor


class UnrolledDraft:
    """draft: read at every call. head_weight [V, H]: the target's. temperature: that the target is sampled with."""

    def __init__(
        self, draft: Eagle3Draft, head_weight: torch.Tensor, num_steps: int, temperature: float, max_tokens: int
    ):
        self.draft = draft
        self.head_weight = head_weight.detach()
        self.num_steps = num_steps
        self.temperature = temperature
        self.max_tokens = max_tokens

    def pack(self, sequences: Sequence[DraftSequence]) -> list[DraftBatch]:
        for sequence in sequences:
            check_sequence(sequence, self.draft.config)
        return pack_drafts(sequences, self.max_tokens, self.num_steps, self.draft.token_map.device)

    @torch.no_grad()
    def evaluate(self, sequences: Sequence[DraftSequence], draft_temperature: float = 1.0) -> dict[str, float]:
        """Acceptance under the engine's rule, with the draft's logits divided by draft_temperature.

        acceptance_i is the mean, over trained tokens, of the probability that draft token i would be accepted
        after i accepted ones: for i = 0 just what speculation does, for later i along the given tokens.
        tokens_per_step = 1 + sum over i of the product of the acceptances up to i.
        """
        batches = self.pack(sequences)
        sums = torch.zeros(self.num_steps, dtype=torch.float64, device=self.draft.token_map.device)
        for batch in batches:
            targets = self.targets(batch)
            for step, normed in enumerate(self.steps(batch)):
                for rows, numbers in row_chunks(batch, step):
                    log_p, log_q = self.log_probs(normed[rows], targets, numbers, draft_temperature)
                    sums[step] += log_acceptance(log_p, log_q).exp().double().sum()
        counts = [sum(len(batch.trained[step]) for batch in batches) for step in range(self.num_steps)]
        if not counts[0]:
            raise ValueError("no token of the sequences can be drafted")
        acceptances = [total / max(1, count) for total, count in zip(sums.tolist(), counts, strict=True)]
        expected, reached = 1.0, 1.0
        for acceptance in acceptances:
            reached *= acceptance
            expected += reached
        named = {f"acceptance_{step}": acceptance for step, acceptance in enumerate(acceptances)}
        return {**named, "tokens_per_step": expected}

    @torch.no_grad()
    def draw(self, sequences: Sequence[DraftSequence], seeds: Sequence[int]) -> list[torch.Tensor]:
        """The tokens that the engine drafts at each row of samples with these seeds: int64 [n - 1, num_steps] each.

        The draft tokens of row t stand for the tokens from t + 2 on, and use their noise. Draft token i assumes that
        those before it are the sample's own: after a wrong one nothing is accepted, whatever is drafted.
        """
        drafts: dict[int, torch.Tensor] = {}
        for batch in self.pack(sequences):
            lengths = batch.cu_seqlens.diff().tolist()
            of_rows = torch.tensor(
                [seeds[number] for number in batch.members], dtype=torch.int64, device="cpu"
            ).repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device="cpu"))
            of_rows = of_rows.to(batch.positions.device)
            steps = [
                self._drawn(normed, of_rows, batch.positions + 2 + i) for i, normed in enumerate(self.steps(batch))
            ]
            tokens = torch.stack(steps, dim=1)
            drafts |= zip(batch.members, tokens.cpu().split(lengths), strict=True)
        return [drafts[number] for number in range(len(sequences))]

    def _drawn(self, normed: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `EagleDrafter` draws: the target's rule and noise over the draft's tokens."""
        token_map, parts = self.draft.token_map, []
        for rows in torch.arange(len(normed), dtype=torch.int64, device=normed.device).split(ROWS_AT_ONCE):
            noise = gumbel_noise(seeds[rows], positions[rows], self.draft.config.vocab_size)[:, token_map]
            parts.append((self.draft.logits(normed[rows]).float() / self.temperature + noise).argmax(-1))
        return self.draft.target_ids(torch.cat(parts))

    def tune_temperature(
        self, sequences: Sequence[DraftSequence], candidates: Sequence[float] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
    ) -> float:
        """The candidate under which the most tokens per step are expected. Any is exact: it changes the speed alone."""
        return max(candidates, key=lambda candidate: self.evaluate(sequences, candidate)["tokens_per_step"])

    def log_probs(
        self, normed: torch.Tensor, targets: Targets, numbers: torch.Tensor, draft_temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p, log q) [R, draft vocabulary] in fp32 of rows and of their targets."""
        temperature = self.temperature
        log_q = (self.draft.logits(normed).float() / (temperature * draft_temperature)).log_softmax(-1)
        log_p = targets.logits[numbers].float() / temperature - targets.lse[numbers, None]
        return log_p, log_q

    @torch.no_grad()
    def targets(self, batch: DraftBatch) -> Targets:
        token_map = self.draft.token_map
        is_drafted = torch.zeros(len(self.head_weight), dtype=torch.bool, device=self.draft.token_map.device)
        is_drafted[token_map] = True
        parts = []
        for rows in batch.target_rows.split(ROWS_AT_ONCE):
            logits = linear(batch.last[rows], self.head_weight)
            lse = (logits.float() / self.temperature).logsumexp(-1)
            parts.append((logits[:, token_map], lse, is_drafted[logits.argmax(-1)]))
        return Targets(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def steps(self, batch: DraftBatch) -> Iterator[torch.Tensor]:
        """The rows' normed states [T, H], step by step."""
        last_position = self.draft.config.max_position_embeddings - 1
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        g = self.draft.combine(batch.aux)
        for step, token_ids in enumerate(batch.token_ids):
            # Only rows that are not trained would be past the end.
            positions = (batch.positions + step).clamp(max=last_position)
            attend = partial(self._attend, positions=positions, keys=keys, values=values, cu_seqlens=batch.cu_seqlens)
            normed, g = self.draft.layer(g, token_ids, attend)
            yield normed

    def _attend(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        """The attention of the next step at all rows; appends its keys and values."""
        config, table = self.draft.config, self.draft.rope_cos_sin
        by_group = qkv.view(len(qkv), config.num_kv_heads, -1, config.head_dim)
        q = by_group[:, :, :-2].reshape(len(qkv), config.num_heads, config.head_dim)
        keys.append(apply_rope(by_group[:, :, -2], table, positions))
        values.append(by_group[:, :, -1].contiguous())
        out = chain_attention(apply_rope(q, table, positions), keys, values, cu_seqlens, config.head_dim**-0.5)
        return out.flatten(1)


def row_chunks(batch: DraftBatch, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(rows, numbers of their targets), a bounded number at a time."""
    if len(batch.trained[step]):
        yield from zip(batch.trained[step].split(ROWS_AT_ONCE), batch.targets[step].split(ROWS_AT_ONCE), strict=True)
