import pytest

from lockstep.rollout.rewards import isolation


@pytest.fixture(params=["bubblewrap", "landlock"])
def sandbox(request):
    if why := isolation.why_not(request.param):
        pytest.skip(why)
    return request.param
