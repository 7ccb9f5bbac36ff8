"""From samples to updates: what lands in the batches, the critic, the teacher, and a learner that is resumed."""

from dataclasses import replace

import pytest

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.recipes.cluster.local import LocalCluster
from lockstep.recipes.inputs import starting_directory
from lockstep.recipes.rl import rl
from lockstep.recipes.rl.learner import Learner
from lockstep.recipes.rl.training_batches import BatchShape, policy_batches, scored_responses
from lockstep.recipes.runs.config import START, ModelShape, ModelSource
from lockstep.rollout.config import RolloutConfig
from lockstep.rollout.sample import Sample
from lockstep.rollout.tasks import ReasoningGymConfig
from lockstep.rollout.tasks.config import TaskConfig
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.algorithms import build_algorithm
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig
from lockstep.trainer_bridge.algorithms.responses import RewardShaping, token_rewards
from lockstep.trainer_bridge.algorithms.returns import whitened
from lockstep.trainer_bridge.packing import TrainSequence, pack

CONFIG = rl.RLConfig(
    seed=3,
    model=ModelSource(shape=ModelShape(num_layers=1, hidden_size=32, num_heads=2, head_dim=16, ffn_hidden_size=64)),
    task=TaskConfig(reasoning_gym=ReasoningGymConfig(dataset="chain_sum", train_size=100, held_out_size=20)),
    trainer=TrainerConfig(model=START, learning_rate=1e-2, max_tokens_per_micro_batch=64),
    engine=EngineConfig(model=START, kv_cache_tokens=4096),
    rollout=RolloutConfig(max_tokens=12),
)


def sample(response_ids, logprobs, reward, versions=None, prompt_ids=(5, 6), finish_reason="stop", index=0):
    return Sample(
        problem_id="p",
        step=1,
        prompt_index=0,
        sample_index=index,
        seed=index,
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(response_ids),
        logprobs=tuple(logprobs),
        weight_versions=tuple(versions or [4] * len(response_ids)),
        finish_reason=finish_reason,
        text="",
        reward=reward,
        correct=reward > 0,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "start"
    return str(starting_directory(CONFIG.model, path, CONFIG.task.build().train, CONFIG.seed))


@pytest.fixture(scope="module")
def groups(model):
    """Two groups of three samples from the engine."""
    engine = Engine(replace(CONFIG.engine, model=model))
    made = []
    for prompt in ([7, 8, 9], [10, 11]):
        params = [SamplingParams(max_tokens=3 + 4 * i, seed=i) for i in range(3)]
        outputs = engine.generate([prompt] * 3, params)
        made.append(
            [
                sample(o.token_ids, o.logprobs, float(i == 1), o.weight_versions, prompt, "length", i)
                for i, o in enumerate(outputs)
            ]
        )
    engine.shutdown()
    return made


def learner(model, **options):
    config = replace(CONFIG, algorithm=AlgorithmConfig(**options))
    cluster = LocalCluster(replace(config.trainer, model=model), replace(config.engine, model=model))
    return Learner(config, cluster, model)


SHAPE = BatchShape(max_tokens=64, temperature=0.5, max_response_tokens=12)


def batches_of(samples, version, **options):
    algorithm = build_algorithm(AlgorithmConfig(**options), SHAPE.max_response_tokens)
    responses = scored_responses([samples])
    (batches,) = policy_batches(algorithm, [samples], responses, algorithm.advantages(responses), version, SHAPE)
    return batches


def test_a_samples_tokens_land_on_the_rows_that_predict_them():
    samples = [sample([1, 2], [-0.5, -1.5], 1.0, [3, 4]), sample([3], [-2.5], 0.0)]
    (batch,) = batches_of(samples, version=4, name="rloo")
    assert batch.temperature == 0.5
    assert batch.token_ids.tolist() == [5, 6, 1, 2, 5, 6, 3]
    assert (batch.weights > 0).tolist() == [False, True, True, False, False, True, False]
    assert batch.advantages.tolist() == [0, 1, 1, 0, 0, -1, 0]
    assert batch.old_logprobs.tolist() == [0, -0.5, -1.5, 0, 0, -2.5, 0]
    assert batch.lags.tolist() == [0, 1, 0, 0, 0, 0, 0]
    (batch,) = batches_of([samples[1], replace(samples[1], reward=1.0)], version=4, name="rloo")
    assert batch.lags is None


def test_a_turns_reward_is_credited_to_what_was_written_up_to_its_end():
    """Of three turns the second is followed by nothing: it was aborted before its first token, as was the last."""
    episode = replace(
        sample([1, 2, 7, 8, 3], [-0.5, -0.5, None, None, -0.5], reward=1.5),
        response_mask=(True, True, False, False, True),
        turn_rewards=(0.5, 1.25, -0.25),
    )
    ((response,),) = scored_responses([[episode]])
    assert response.turn_rewards == [0.0, 0.5, 1.0]
    assert token_rewards(response, RewardShaping()) == [0.0, 0.5, 1.0]
    algorithm = build_algorithm(AlgorithmConfig(name="reinforce_pp", gamma=0.5), SHAPE.max_response_tokens)
    returns = [0.5 * (0.5 + 0.5 * 1.0), 0.5 + 0.5 * 1.0, 1.0]
    assert algorithm.advantages([[response]]) == whitened([[returns]])
    group = build_algorithm(AlgorithmConfig(name="rloo"), SHAPE.max_response_tokens)
    ((first, second),) = group.advantages([[response, replace(response, reward=0.0, turn_rewards=None)]])
    assert (first, second) == ([1.5] * 3, [-1.5] * 3)
    shaping = RewardShaping(kl_coefficient=0.5, max_tokens=4, overlong_tokens=2, overlong_penalty=2.0)
    penalised = replace(response, ref_logprobs=[-1.5, -0.5, -0.5])
    assert token_rewards(penalised, shaping) == [-0.5, 0.5, 1.0]  # no turn of it is too long


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [0, 0, 0, 0, 0, -2]),  # a single turn of 6 tokens, which may have 6
        ("wwwwww", [0, 0, 0, 0, 0, -2]),
        ("wwwrwww", [0, 0, 0, 0, 0, 0]),  # two turns of 3: as many tokens in all, and far from a turn's limit
        ("wwwwwrw", [0, 0, 0, 0, -1, 0]),  # the first is half into the last two tokens
        ("wrrwwwwww", [0, 0, 0, 0, 0, 0, -2]),  # the second was truncated
        ("wwwwwrrrrrwwwww", [0, 0, 0, 0, -1, 0, 0, 0, 0, -1]),  # what it read is long, and costs nothing
    ],
)
def test_a_turn_is_too_long_by_its_own_limit(mask, expected):
    letters = mask or "wwwwww"
    logprobs = [-0.5 if letter == "w" else None for letter in letters]
    episode = sample(list(range(len(letters))), logprobs, reward=0.0)
    if mask is not None:
        turns = len([run for run in mask.split("r") if run])
        written = tuple(letter == "w" for letter in mask)
        episode = replace(episode, response_mask=written, turn_rewards=(0.0,) * turns)
    ((response,),) = scored_responses([[episode]])
    shaping = RewardShaping(max_tokens=6, overlong_tokens=2, overlong_penalty=2.0)
    assert token_rewards(response, shaping) == expected


def test_responses_that_are_not_learned_from_are_left_out():
    samples = [sample([1, 2], [-0.5, -1.5], 1.0), sample([3], [-2.5], 0.0)]
    (batch,) = batches_of(samples, version=4, name="sft")
    assert batch.token_ids.tolist() == [5, 6, 1, 2]
    (batch,) = batches_of(samples[1:], version=4, name="sft")
    assert batch.token_ids.tolist() == [5, 6, 3]
    assert batch.advantages.count_nonzero() == 0


def test_a_teacher_with_the_policys_weights_teaches_nothing(model, groups):
    with learner(model, name="distillation", teacher_model=model) as student:
        stats = student.step(groups)
    assert stats["logprob_diff_max"] == 0.0
    assert stats["grad_norm"] == 0.0


def test_ppos_critic_learns_the_rewards(model, groups):
    with learner(model, name="ppo", critic_learning_rate=1e-2, value_clip=10.0) as ppo:
        stats = [ppo.step(groups) for _ in range(6)]
    assert stats[0]["critic_value"] == 0.0  # a new head
    assert stats[-1]["critic_value_error"] < 0.5 * stats[0]["critic_value_error"]


def test_a_resumed_learner_goes_on_as_the_first(model, groups, tmp_path):
    options = {"name": "ppo", "entropy_target": 100.0, "entropy_adjustment": 0.1, "critic_learning_rate": 1e-2}
    with learner(model, **options) as first:
        first.step(groups)
        first.trainer.save(tmp_path / "trainer")
        first.save(tmp_path / "learner")
        undisturbed = first.step(groups)
    assert undisturbed["entropy_coefficient"] == 0.1
    with learner(model, **options) as second:
        second.trainer.load(tmp_path / "trainer")
        second.load(tmp_path / "learner")
        assert second.step(groups) == undisturbed
    assert second.trainer.weights_hash() == first.trainer.weights_hash()
    assert second.critic.weights_hash() == first.critic.weights_hash()


def test_an_entropy_bonus_raises_the_entropy(model, groups):
    def entropy_after(coefficient):
        with learner(model, name="grpo", entropy_coefficient=coefficient) as one:
            return [one.step(groups)["entropy"] for _ in range(4)][-1]

    assert entropy_after(1.0) > entropy_after(0.0)


@pytest.mark.parametrize(
    ("options", "lag"),
    [({"name": "reinforce_pp"}, 0), ({"name": "grpo", "aggregation": "token_mean", "off_policy": "token"}, 1)],
    ids=["advantages normalised over the step", "tokens of an earlier version"],
)
def test_each_mini_batch_of_each_epoch_is_an_update(model, groups, options, lag):
    """Against updates made by hand, all of which have the log-probs and the advantages from before the step."""
    groups = [
        [replace(s, weight_versions=(-lag,) * len(s.response_ids), reward=s.reward * (1 + 2 * number)) for s in group]
        for number, group in enumerate(groups)
    ]
    with learner(model, mini_batches=2, epochs=2, **options) as one:
        stats = one.step(groups)
    by_hand = MegatronTrainer(replace(CONFIG.trainer, model=model))
    algorithm = build_algorithm(AlgorithmConfig(**options), CONFIG.rollout.max_tokens)
    advantages = algorithm.advantages(scored_responses(groups))

    def sequence(sample, advantage):
        of_prompt = len(sample.prompt_ids)
        tokens = [*sample.prompt_ids, *sample.response_ids]
        old = {
            "lags": [lag] * len(advantage),
            "proximal_logprobs": by_hand.logprobs([tokens])[0][of_prompt:],
        }
        return TrainSequence(
            tokens,
            [index >= of_prompt for index in range(len(tokens))],
            advantage,
            list(sample.logprobs),
            **(old if lag else {}),
        )

    updates = [pack(list(map(sequence, *both)), 64) for both in zip(groups, advantages, strict=True)]
    expected = [by_hand.step(batches, algorithm.loss) for batches in updates * 2]
    assert one.trainer.weights_hash() == by_hand.weights_hash()
    assert one.trainer.step_count == 4
    assert one.config.steps_made(one.trainer.step_count) == 1
    assert stats["logprob_diff_max"] == expected[0]["logprob_diff_max"] == 0.0
    shifts = [update["policy_shift_max" if lag else "logprob_diff_max"] for update in expected]
    assert stats["policy_shift_max"] == max(shifts) > 0.0
    assert stats["clip_fraction"] == sum(update["clip_fraction"] for update in expected) / 4 > 0.0
    assert stats["tokens"] == 2 * sum(len(s.prompt_ids) + len(s.response_ids) for group in groups for s in group)


def test_more_mini_batches_than_groups_are_refused():
    with pytest.raises(ValueError, match=r"mini_batches=9 is more than .*rollout\.prompts_per_step=8"):
        replace(CONFIG, rollout=RolloutConfig(prompts_per_step=8), algorithm=AlgorithmConfig(mini_batches=9))
    with pytest.raises(ValueError, match=r"algorithm\.epochs must be at least 1"):
        AlgorithmConfig(epochs=0)
