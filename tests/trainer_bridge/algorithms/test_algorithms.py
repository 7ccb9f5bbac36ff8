"""Each algorithm against an example worked out by hand, and against loops in fp64 written from its paper."""

import math
import random
import statistics

import pytest
import torch

from lockstep.trainer_bridge.algorithms.algorithm_config import next_entropy_coefficient
from lockstep.trainer_bridge.algorithms.algorithms import ALGORITHMS, build_algorithm
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig
from lockstep.trainer_bridge.algorithms.responses import ScoredResponse
from lockstep.trainer_bridge.packing import TrainSequence, pack

MAX_TOKENS = 8


def built(name, max_tokens=MAX_TOKENS, **options):
    if name == "distillation":
        options["teacher_model"] = "teacher"
    return build_algorithm(AlgorithmConfig(name=name, **options), max_tokens)


def loss_of(algorithm, groups, logprobs, max_tokens=MAX_TOKENS):
    """(the step's loss, its gradient per response) of our code, in two micro-batches or more. logprobs: by response."""
    sequences, learned = [], []
    for number, (group, rows) in enumerate(zip(groups, algorithm.advantages(groups), strict=True)):
        for response, row in zip(group, rows, strict=True):
            learned.append(row is not None)
            if row is not None:
                sequences.append(
                    TrainSequence(
                        token_ids=list(range(1, len(response) + 3)),
                        loss_mask=[False, False] + [True] * len(response),
                        advantage=row,
                        logprobs=response.logprobs,
                        ref_logprobs=response.ref_logprobs,
                        group=number,
                    )
                )
    micro_batch_tokens = max(len(sequence.token_ids) for sequence in sequences) + 4
    batches = pack(sequences, micro_batch_tokens, algorithm.config.aggregation, length=max_tokens)
    order = {tuple(sequence.logprobs): i for i, sequence in enumerate(sequences)}
    current = [row for row, is_learned in zip(logprobs, learned, strict=True) if is_learned]
    total, gradients = 0.0, {}
    for batch in batches:
        rows, start = [], 0
        for length in batch.cu_seqlens.diff().tolist():
            old = batch.old_logprobs[start + 1 : start + length - 1].tolist()
            index = next(i for key, i in order.items() if key == pytest.approx(old, rel=1e-6))
            rows.append((index, start, length))
            start += length
        lp = torch.zeros(start)
        for index, first, length in rows:
            lp[first + 1 : first + length - 1] = torch.tensor(current[index])
        lp.requires_grad_()
        loss, _ = algorithm.loss(lp, batch)
        assert torch.isfinite(loss).all()
        step_loss = (loss * batch.weights).sum()
        step_loss.backward()
        total += step_loss.item()
        for index, first, length in rows:
            gradients[index] = lp.grad[first + 1 : first + length - 1].tolist()
    return total, [gradients[i] for i in range(len(sequences))]


HAND = [
    [
        ScoredResponse(1.0, [-1.0, -1.0], teacher_logprobs=[-0.5, -2.0], values=[0.5, 0.25]),
        ScoredResponse(0.0, [-1.0], teacher_logprobs=[-1.0], values=[0.5]),
    ]
]
HAND_RATIOS = [[1.5, 1.0], [0.5]]
R = math.sqrt(0.5)
# name: options, advantages, loss. One group of two responses, of 2 tokens (reward 1) and of 1 token (reward 0); the
# policy has moved to the ratios 1.5, 1 and 0.5; 4 tokens are allowed.
BY_HAND = {
    "grpo": ({}, [[R, R], [-R]], -R * ((1.2 + 1.0) / 2 - 0.8) / 2),
    "dr_grpo": ({}, [[0.5, 0.5], [-0.5]], -(0.5 * 2.2 - 0.5 * 0.8) / (2 * 4)),
    "dapo": ({}, [[R, R], [-R]], -R * (1.28 + 1.0 - 0.8) / 3),
    "gspo": ({}, [[R, R], [-R]], -R * (1.0004 - 0.9997) / 2),
    "cispo": ({}, [[R, R], [-R]], 0.2463629),
    "rloo": ({}, [[1.0, 1.0], [-1.0]], -(1.5 + 1.0 - 0.5) / 2),
    "reinforce_pp": ({}, [[R, R], [-2 * R]], -R * (2.2 - 2 * 0.8) / 3),
    "reinforce_pp_baseline": ({}, [[R, R], [-2 * R]], -R * (2.2 - 2 * 0.8) / 3),
    "ppo": ({"gae_lambda": 0.5}, [[0.0, 1.2247449], [-1.2247449]], -0.0816497),
    "distillation": ({}, [[0.5, -1.0], [0.0]], 0.25 / 3),
    "sft": ({}, [[1.0, 1.0], None], (0.5945349 + 1.0) / 2),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_example_worked_out_by_hand(name):
    options, advantages, expected = BY_HAND[name]
    algorithm = built(name, max_tokens=4, **options)
    (actual,) = algorithm.advantages(HAND)
    for row, wanted in zip(actual, advantages, strict=True):
        assert row == (wanted if wanted is None else pytest.approx(wanted, abs=2e-6))
    logprobs = [
        [old + math.log(ratio) for old, ratio in zip(response.logprobs, ratios, strict=True)]
        for response, ratios in zip(HAND[0], HAND_RATIOS, strict=True)
    ]
    loss, _ = loss_of(algorithm, HAND, logprobs, max_tokens=4)
    assert loss == pytest.approx(expected, abs=2e-6)


def test_the_critics_returns_by_hand():
    critic = built("ppo", gae_lambda=0.5).critic
    assert critic.returns(HAND) == [[[0.625, 1.0], [0.0]]]


# Loops in fp64 --------------------------------------------------------------------------------------------------------


def random_groups(seed=0):
    rng = random.Random(seed)
    groups, logprobs = [], []
    for rewards in ([1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [0.5, 0.5]):
        group = []
        for reward in rewards:
            length = rng.randint(1, MAX_TOKENS)
            old = [rng.uniform(-3, -0.1) for _ in range(length)]
            ref, teacher = ([lp + rng.gauss(0, 0.3) for lp in old] for _ in range(2))
            values = [rng.uniform(0, 1) for _ in old]
            is_truncated = length == MAX_TOKENS
            group.append(ScoredResponse(reward, old, is_truncated, ref, teacher, values))
            logprobs.append([lp + rng.gauss(0, 0.3) for lp in old])
        groups.append(group)
    return groups, logprobs


def slow_kl(kind, lp, ref):
    d = lp - ref
    exp = math.exp if isinstance(d, float) else torch.exp
    return {"k1": d, "k2": d * d / 2, "k3": exp(-d) - 1 + d}[kind]


def slow_advantages(name, groups, beta):
    """From the papers; beta: of the KL in the reward (k1)."""

    def shaped(r):
        penalty = sum(slow_kl("k1", lp, ref) for lp, ref in zip(r.logprobs, r.ref_logprobs, strict=True))
        too_long = max(0.0, len(r) - (MAX_TOKENS - MAX_TOKENS // 5)) / (MAX_TOKENS // 5) if name == "dapo" else 0.0
        return r.reward - too_long - beta * penalty

    def rewards_of_tokens(r):
        token_rewards = [-beta * slow_kl("k1", lp, ref) for lp, ref in zip(r.logprobs, r.ref_logprobs, strict=True)]
        token_rewards[-1] += r.reward
        return token_rewards

    rows = []
    for group in groups:
        totals = [shaped(r) for r in group]
        for i, r in enumerate(group):
            others = totals[:i] + totals[i + 1 :]
            if name in ("grpo", "dapo", "gspo", "cispo"):
                std = statistics.stdev(totals)
                row = [(totals[i] - statistics.mean(totals)) / (std + 1e-6) if std else 0.0] * len(r)
            elif name in ("dr_grpo", "reinforce_pp_baseline"):
                row = [totals[i] - statistics.mean(totals)] * len(r)
            elif name == "rloo":
                row = [totals[i] - statistics.mean(others)] * len(r)
            elif name == "reinforce_pp":
                row = [sum(rewards_of_tokens(r)[t:]) for t in range(len(r))]
            elif name == "ppo":
                row = slow_gae(rewards_of_tokens(r), r.values, 1.0, 0.9)
            elif name == "distillation":
                row = [teacher - lp for teacher, lp in zip(r.teacher_logprobs, r.logprobs, strict=True)]
            else:
                row = [1.0] * len(r) if r.reward > 0 else None
            rows.append(row)
    if name in ("reinforce_pp", "reinforce_pp_baseline", "ppo"):
        numbers = [a for row in rows for a in row]
        mean, std = statistics.mean(numbers), statistics.pstdev(numbers)
        rows = [[(a - mean) / std for a in row] for row in rows]
    return rows


def slow_gae(rewards, values, gamma, lam):
    """The sum of equation 16: sum over l of (gamma lambda)^l delta_(t+l)."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v_next, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


def slow_loss(name, groups, rows, lps, beta, kind):
    """lps: fp64 scalars with a gradient, by response; beta: of the KL in the loss."""
    responses = [r for group in groups for r in group]
    low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(name, (0.2, 0.2))
    token_losses = []
    for r, row, lp in zip(responses, rows, lps, strict=True):
        losses = []
        for t in range(len(r)):
            if row is None:
                continue
            ratio = torch.exp(lp[t] - r.logprobs[t])
            if name == "gspo":
                mean = sum(lp[s] - r.logprobs[s] for s in range(len(r))) / len(r)
                ratio = torch.exp(mean)
            if name == "cispo":
                loss = -min(ratio.item(), 5.0) * row[t] * lp[t]
            elif name in ("rloo", "distillation"):
                loss = -ratio * row[t]
            elif name == "sft":
                loss = -row[t] * lp[t]
            else:
                bounded = min(max(ratio, torch.tensor(1 - low).double()), torch.tensor(1 + high).double())
                loss = -min(ratio * row[t], bounded * row[t])
            losses.append(loss + beta * slow_kl(kind, lp[t], r.ref_logprobs[t]))
        token_losses.append(losses)
    learned = [losses for losses in token_losses if losses]
    if name in ("grpo", "gspo"):
        return sum(sum(losses) / len(losses) for losses in learned) / len(learned)
    if name == "dr_grpo":
        return sum(sum(losses) for losses in learned) / len(learned) / MAX_TOKENS
    if name == "rloo":
        return sum(sum(losses) for losses in learned) / len(learned)
    return sum(sum(losses) for losses in learned) / sum(len(losses) for losses in learned)


@pytest.mark.parametrize("kl", [None, ("loss", "k1"), ("loss", "k2"), ("loss", "k3"), ("reward", "k1")])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_and_loss_against_loops(name, kl):
    if kl == ("reward", "k1") and name in ("distillation", "sft"):
        with pytest.raises(ValueError, match="reads no rewards"):
            built(name, kl_coefficient=0.1, kl_in="reward")
        return
    options = {"gae_lambda": 0.9} if name == "ppo" else {}
    beta = {"reward": 0.0, "loss": 0.0}
    if kl is not None:
        options |= {"kl_coefficient": 0.1, "kl_in": kl[0], "kl_estimator": kl[1]}
        beta[kl[0]] = 0.1
    algorithm = built(name, **options)
    groups, logprobs = random_groups()
    rows = slow_advantages(name, groups, beta["reward"])
    actual = [row for group in algorithm.advantages(groups) for row in group]
    for row, expected in zip(actual, rows, strict=True):
        assert row == (expected if expected is None else pytest.approx(expected, abs=1e-6))
    lps = [[torch.tensor(lp, dtype=torch.float64, requires_grad=True) for lp in row] for row in logprobs]
    expected = slow_loss(name, groups, rows, lps, beta["loss"], kl[1] if kl else "k1")
    expected.backward()
    loss, gradients = loss_of(algorithm, groups, logprobs)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    learned = [row for row, advantage in zip(lps, rows, strict=True) if advantage is not None]
    for row, lp in zip(gradients, learned, strict=True):
        assert row == pytest.approx([x.grad.item() for x in lp], abs=1e-5)


# Options --------------------------------------------------------------------------------------------------------------


def test_dynamic_sampling_keeps_mixed_groups():
    assert built("dapo").keep_group([1.0, 0.0, 1.0])
    assert not built("dapo").keep_group([1.0, 1.0])
    assert built("dapo", drop_equal_groups=False).keep_group([1.0, 1.0])
    assert built("grpo").keep_group([0.0, 0.0])


def test_truncated_responses_can_be_left_out():
    groups = [[ScoredResponse(1.0, [-1.0]), ScoredResponse(0.0, [-1.0] * 8, truncated=True)]]
    (rows,) = built("dr_grpo", mask_truncated=True).advantages(groups)
    assert rows == [[0.5], None]


def test_entropy_control_moves_towards_the_target():
    config = AlgorithmConfig(entropy_target=0.5, entropy_adjustment=0.25)
    assert next_entropy_coefficient(0.25, 0.4, config) == 0.5
    assert next_entropy_coefficient(0.25, 0.6, config) == 0.0
    assert next_entropy_coefficient(0.0, 0.6, config) == 0.0
    assert next_entropy_coefficient(0.25, 0.4, AlgorithmConfig()) == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gropo"}, "unknown algorithm 'gropo'; there are: grpo"),
        ({"name": "distillation"}, "needs a teacher"),
        ({"name": "grpo", "teacher_model": "x"}, "grpo has no teacher_model; it is an option of: distillation"),
        ({"name": "rloo", "divide_by_std": True}, "rloo has no divide_by_std"),
        ({"name": "grpo", "gae_lambda": 0.9}, "grpo has no gae_lambda"),
        ({"name": "sft", "overlong_tokens": 2}, "sft reads no rewards"),
        ({"name": "grpo", "overlong_tokens": 9}, "overlong_tokens=9 of 8"),
        ({"kl_coefficient": -1.0}, "kl_coefficient must be at least 0"),
        ({"gamma": 1.5}, "gamma must be at most 1"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_algorithm(AlgorithmConfig(**options), MAX_TOKENS)
