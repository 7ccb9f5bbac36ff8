"""Environments in another process: the same episodes, and nothing that they do reaches this one."""

import gc
from pathlib import Path

import pytest
from user_environments import Echo

from lockstep.engine import RequestOutput, SamplingParams
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.environments import EnvironmentConfig
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import EpisodeLimits
from lockstep.rollout.environments.episode import Episode
from lockstep.rollout.environments.own_process import EnvironmentProcess, RemoteEnvironment
from lockstep.rollout.guarded import GuardedCalls
from lockstep.rollout.tasks import Problem
from lockstep.rollout.tokenizer import build_tokenizer

PROBLEM = Problem("p/0", ({"role": "user", "content": "?"},), "7", {"any": (1, 2)})


@pytest.fixture(scope="module")
def chat():
    return ChatTurns(build_tokenizer(["What is 3 + 4? 12 tokens"], TokenizerConfig(vocab_size=280)))


@pytest.fixture
def processes():
    """Makes processes, and closes them."""
    made = []

    def process(timeout_s=60.0, **options):
        config = EnvironmentConfig(kind="user_environments.Hostile", own_process=True, options=options)
        if not options:
            config = EnvironmentConfig(kind="user_environments.Echo", own_process=True, options={"num_turns": 3})
        made.append(EnvironmentProcess(config, timeout_s))
        return made[-1]

    yield process
    for each in made:
        each.close()


def is_alive(pid: int) -> bool:
    """Not counting one that has ended and that nobody has waited for."""
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False


def new_episode(chat, environment) -> Episode:
    return Episode(
        environment, PROBLEM, chat, EpisodeLimits(9, 20, 500), SamplingParams(), lambda _: [], GuardedCalls(None)
    )


def play_turns(episode: Episode, count: int) -> None:
    for _ in range(count):
        if episode.finish_reason is None:
            episode.next_request()
            written = [5] * (1 + len(episode.turn_rewards))
            zeros = [0] * len(written)
            episode.advance(RequestOutput(0, 0, 0, [1], written, [-0.5] * len(written), "stop", zeros, None, 0, 0))


def outcome(episode: Episode) -> tuple:
    return episode.transcript, episode.finish_reason, episode.turn_rewards, list(map(str, episode.failures))


def test_episodes_are_those_of_this_process(chat, processes):
    process = processes()
    here, *there = (new_episode(chat, make) for make in (lambda: Echo(3), *[lambda: RemoteEnvironment(process)] * 2))
    play_turns(here, 3)
    for _ in range(3):
        for episode in there:
            play_turns(episode, 1)
    assert outcome(here) == outcome(there[0]) == outcome(there[1])
    assert here.finish_reason == "stop"
    assert process.generation == 1


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("hold the lock", "timeout: no answer within 1 s"),
        ("compute", "timeout: no answer within 1 s"),
        ("leave", "death: it ended its process"),
        ("be killed", "death: it ended its process"),
        ("exit", "SystemExit: bye"),
        ("return nothing", "step returned a NoneType; it must return a StepResult"),
        ("return its past", "step returned a dict; it must return a StepResult"),
    ],
)
def test_no_deed_reaches_this_process_or_another_episode(chat, processes, deed, reason):
    process = processes(deed=deed)
    other, hostile = (new_episode(chat, lambda: RemoteEnvironment(process)) for _ in range(2))
    play_turns(other, 1)
    play_turns(hostile, 1)
    process.timeout_s = 1.0 if "timeout" in reason else 60.0
    play_turns(hostile, 1)
    assert hostile.finish_reason == "error"
    assert str(hostile.failures[0]).startswith("Hostile.step failed at turn 1 of p/0: ")
    assert reason in str(hostile.failures[0])
    process.timeout_s = 60.0
    fresh = new_episode(chat, lambda: RemoteEnvironment(process))
    play_turns(fresh, 1)
    assert process.generation == (2 if "timeout" in reason or "death" in reason else 1)
    assert fresh.finish_reason is other.finish_reason is None
    assert fresh.transcript == other.transcript


def test_an_environment_goes_on_in_a_new_process_where_it_was(chat, processes):
    process = processes()
    undisturbed, moved = (new_episode(chat, lambda: RemoteEnvironment(process)) for _ in range(2))
    for _ in range(2):
        play_turns(undisturbed, 1)
        play_turns(moved, 1)
        process.close()  # as after a call that took too long
    play_turns(undisturbed, 1)
    play_turns(moved, 1)
    assert outcome(undisturbed) == outcome(moved)
    assert (moved.finish_reason, moved.turn_rewards, process.generation) == ("stop", [0.25] * 3, 3)


def test_ended_environments_are_forgotten_and_processes_end_with_their_owner(processes):
    process = processes()
    RemoteEnvironment(process)
    gc.collect()
    kept = RemoteEnvironment(process)
    assert process.ended == []  # told with the second one's first call
    pid = process.process_id
    del kept
    process.close()
    assert not is_alive(pid)


def test_a_process_ends_in_time_where_nobody_is_left_to_kill_it(chat, processes):
    """Also one that holds Python's lock, and reads no end of its channel."""
    process = processes(deed="compute", timeout_s=0.1)
    episode = new_episode(chat, lambda: RemoteEnvironment(process))
    process.timeout_s = 60.0  # over here; it knows of 0.1 s and gives itself some more
    play_turns(episode, 2)
    assert "death: it ended its process" in str(episode.failures[0])
