"""RolloutBuffer: what is begun, grown, taken and thrown away, over random schedules and a worker without a model."""

import math
import random
from dataclasses import replace

import pytest

from lockstep.engine import RequestOutput
from lockstep.rollout.buffer import RolloutBuffer, StalenessError
from lockstep.rollout.config import BufferConfig, RolloutConfig
from lockstep.rollout.group import Group, Response
from lockstep.rollout.tasks import Problem

PROMPTS, SAMPLES, LONGEST = 3, 2, 20


class FakeWorker:
    """Responses whose lengths and rewards follow from their coordinates; `version` draws the tokens."""

    config = RolloutConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, max_tokens=LONGEST)

    def __init__(self, equal_rewards: float):
        self.version = 0
        self.equal_rewards = equal_rewards
        self.begun: dict[int, int] = {}

    def length(self, seed: int) -> int:
        return random.Random(seed).randint(1, LONGEST)

    def begin_at(self, position: int) -> Group:
        self.begun[position] = self.version
        responses = [Response(seed=position * SAMPLES + j) for j in range(SAMPLES)]
        return Group(Problem(f"p{position}", (), ""), position // PROMPTS, position, (1,), responses)

    def extend(self, groups: list[Group], max_new_tokens: int | None) -> int:
        num_tokens = 0
        for group in groups:
            for response in (r for r in group.responses if r.finish_reason is None):
                left = self.length(response.seed) - len(response.response_ids)
                count = min(left, max_new_tokens or left)
                reason = "stop" if count == left else "length"
                drawn = [response.seed * 100 + len(response.response_ids) + i for i in range(count)]
                num_tokens += count
                response.append(output(drawn, [self.version] * count, reason), is_last=count == left)
            if group.has_ended and group.samples is None:
                equal = random.Random(group.prompt_index).random() < self.equal_rewards
                rewards = [float(not equal and j == 0) for j in range(SAMPLES)]
                group.score([""] * SAMPLES, rewards, [False] * SAMPLES)
        return num_tokens


def output(tokens: list[int], versions: list[int], reason: str) -> RequestOutput:
    return RequestOutput(0, 0, 0, [1], tokens, [-0.5] * len(tokens), reason, versions, None, 0, 0)


def make_buffer(config: BufferConfig, equal_rewards: float = 0.0, drops_equal: bool = False) -> RolloutBuffer:
    return RolloutBuffer(FakeWorker(equal_rewards), config, lambda rewards: not drops_equal or len(set(rewards)) > 1)


def make_step(buffer: RolloutBuffer, step: int) -> list:
    groups = buffer.take(step)
    buffer.advance()
    buffer.worker.version = step
    buffer.new_version()
    return groups


def random_config(case: int) -> BufferConfig:
    draw = random.Random(case)
    return BufferConfig(
        max_staleness=draw.choice([0, 0, 1, 2, 4]),
        segment_tokens=draw.choice([None, 1, 3, 7, 30]),
        unfinished=draw.choice(["recompute", "abort"]),
        over_sampling=draw.choice([1.0, 1.0, 1.3, 2.0]),
    )


@pytest.mark.parametrize("drops_equal", [False, True])
@pytest.mark.parametrize("case", range(30))
def test_random_schedules_keep_their_bounds_and_lose_nothing(case, drops_equal):
    config = random_config(case)
    buffer = make_buffer(config, 0.3, drops_equal)
    worker, taken = buffer.worker, []
    for step in range(1, 12):
        groups = make_step(buffer, step)
        assert len(groups) == PROMPTS
        assert len(buffer.groups) <= (config.max_staleness + 1) * math.ceil(PROMPTS * config.over_sampling)
        for group in groups:
            taken.append(group[0].prompt_index)
            assert not drops_equal or group[0].reward != group[1].reward
            for sample in group:
                versions = list(sample.weight_versions)
                assert step - 1 - config.max_staleness <= versions[0]
                assert versions[-1] <= step - 1
                assert versions == sorted(versions)
                assert config.unfinished == "recompute" or len(set(versions)) == 1
                # No token is lost, doubled or made up where a response was interrupted.
                assert list(sample.response_ids) == [sample.seed * 100 + i for i in range(worker.length(sample.seed))]
        if config.over_sampling == 1.0:
            assert buffer.num_too_old == 0
    assert len(set(taken)) == len(taken)
    if config.over_sampling == 1.0:  # the order of the data, without those that were dropped
        dropped = {p for p in range(max(taken)) if random.Random(p).random() < 0.3 and drops_equal}
        assert taken == [p for p in range(PROMPTS, max(taken) + 1) if p not in dropped]


@pytest.mark.parametrize("drops_equal", [False, True])
@pytest.mark.parametrize("case", range(10))
def test_a_buffer_that_is_saved_and_loaded_goes_on_as_if_nothing_had_happened(case, drops_equal, tmp_path):
    config = replace(random_config(case), max_staleness=1 + case % 3)
    whole, before = (make_buffer(config, 0.3, drops_equal) for _ in range(2))
    for step in range(1, 5):
        assert make_step(whole, step) == make_step(before, step)
    before.save(tmp_path / "buffer")
    after = make_buffer(config, 0.3, drops_equal)
    after.worker.version = before.worker.version
    after.load(tmp_path / "buffer")
    for step in range(5, 10):
        assert make_step(whole, step) == make_step(after, step)


def test_synchronous_and_one_step_off_are_what_their_names_say():
    for staleness in (0, 1, 3):
        buffer = make_buffer(BufferConfig(max_staleness=staleness))
        for step in range(1, 8):
            versions = {v for g in make_step(buffer, step) for s in g for v in s.weight_versions}
            assert versions == {max(0, step - 1 - staleness)}


def test_an_interrupted_response_has_spans_of_several_versions():
    buffer = make_buffer(BufferConfig(max_staleness=3, segment_tokens=2))
    spans = [len(set(s.weight_versions)) for step in range(1, 9) for g in make_step(buffer, step) for s in g]
    assert max(spans) >= 3


@pytest.mark.parametrize(("version", "found"), [(0, "0 to 2"), (9, "2 to 9")])
def test_a_group_out_of_bounds_is_an_error_that_names_it(version, found):
    buffer = make_buffer(BufferConfig(max_staleness=1))
    for step in range(1, 4):
        make_step(buffer, step)
    samples = buffer.groups[0].samples
    samples[1] = replace(samples[1], weight_versions=(version, *samples[1].weight_versions[1:]))
    with pytest.raises(StalenessError, match=rf"step 4: the group of prompt 12 \(p12\).* {found};.*allows 2 to 3"):
        buffer.take(4)


def test_a_filter_that_drops_everything_is_an_error_and_no_endless_loop():
    buffer = make_buffer(BufferConfig(max_dropped=2), equal_rewards=1.0, drops_equal=True)
    with pytest.raises(ValueError, match=r"step 1: algorithm.drop_equal_groups has dropped 9 groups.*max_dropped=2"):
        buffer.take(1)


class Failing(FakeWorker):
    """The environments of some prompts fail."""

    def __init__(self, share):
        super().__init__(0.0)
        self.share = share

    def extend(self, groups, max_new_tokens):
        num_tokens = super().extend(groups, max_new_tokens)
        for group in groups:
            if group.samples is not None and random.Random(group.prompt_index).random() < self.share:
                group.is_lost, group.num_failures = True, 2
        return num_tokens


@pytest.mark.parametrize("staleness", [0, 2])
def test_groups_that_are_lost_are_replaced_and_counted(staleness):
    buffer = RolloutBuffer(Failing(0.3), BufferConfig(max_staleness=staleness), lambda rewards: True)
    taken, failures = [], 0
    for step in range(1, 8):
        taken += [group[0].prompt_index for group in make_step(buffer, step)]
        failures += buffer.num_failures
        assert buffer.num_failures == 2 * buffer.num_lost == 2 * buffer.num_dropped
    assert len(taken) == 7 * PROMPTS
    lost = [p for p in range(PROMPTS, buffer.position) if random.Random(p).random() < 0.3]
    assert failures == 2 * len(lost) > 0
    assert not set(taken) & set(lost)


def test_environments_that_always_fail_are_an_error_and_no_endless_loop():
    buffer = RolloutBuffer(Failing(1.0), BufferConfig(max_dropped=2), lambda rewards: True)
    with pytest.raises(ValueError, match=r"step 1: 9 groups are lost to environments that failed, more than.*=2"):
        buffer.take(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_staleness": -1}, "max_staleness must be at least 0"),
        ({"segment_tokens": 0}, "segment_tokens must be at least 1"),
        ({"over_sampling": 0.5}, "over_sampling must be at least 1"),
        ({"unfinished": "keep"}, "can be rebuilt neither"),
        ({"unfinished": "drop"}, "must be one of recompute, abort"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BufferConfig(**changes)
