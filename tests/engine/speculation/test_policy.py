"""When speculation is on: by batch size, and by request."""

import pytest

from lockstep.engine import SamplingParams
from lockstep.engine.request import Request
from lockstep.engine.speculation import policy as policies
from lockstep.engine.speculation.policy import PolicyConfig, SpeculationPolicy

# Tokens per second of batches of up to 3 requests and of more: (without drafts, with).
RATES = {2: (100.0, 180.0), 32: (900.0, 700.0)}


def steps(policy, num_requests, count):
    """The decisions of so many steps, each of which takes what RATES says."""
    decisions = []
    for _ in range(count):
        speculates = policy.allows_step(num_requests)
        policy.record_step(num_requests, speculates, 10, 10 / RATES[num_requests][speculates])
        decisions.append(speculates)
    return decisions


def test_the_faster_way_is_measured_by_batch_size():
    policy = SpeculationPolicy(PolicyConfig())
    judged = 2 * (policies.WARM_UP_STEPS + policies.MEASURED_STEPS)
    for num_requests, (plain, speculating) in RATES.items():
        decisions = steps(policy, num_requests, 3 * policies.RETRY_EVERY_STEPS)
        later = decisions[judged:]
        faster = speculating > plain
        assert later.count(not faster) <= 3 * policies.RETRY_STEPS
        assert later.count(not faster) > 0, "the slower way is tried again: it may have become the faster"


def test_a_fixed_threshold():
    policy = SpeculationPolicy(PolicyConfig(max_requests=4))
    assert [policy.allows_step(number) for number in (1, 4, 5)] == [True, True, False]


def test_a_request_whose_drafts_fail_pauses():
    policy = SpeculationPolicy(PolicyConfig(min_accepted=0.25, pause_tokens=10))
    request = Request(request_id=0, prompt_ids=[1, 2], params=SamplingParams())
    tries = 0
    while policy.allows(request):
        policy.record_drafts(request, 0)
        tries += 1
    assert 5 < tries < 20
    for _ in range(10):
        assert not policy.allows(request)
        request.extend([3], [0.0], 0)
    assert policy.allows(request)
    for _ in range(50):
        policy.record_drafts(request, 1)
    assert policy.allows(request)


@pytest.mark.parametrize("settings", [{"max_requests": -1}, {"min_accepted": -0.1}, {"pause_tokens": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PolicyConfig(**settings)
