"""Whatever an isolated process does, it is stopped at a limit, says why, and harms nothing."""

import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lockstep.rollout.rewards import Completion, RewardEngines, build_reward
from lockstep.rollout.rewards.isolation import Limits, run_program
from lockstep.rollout.tasks import Problem

# A busy machine may take seconds to start a process: the wall clock is short only where it is what stops one.
LIMITS = Limits(wall_time_s=60.0, cpu_time_s=1, memory_bytes=1 << 29, file_bytes=1 << 20, output_bytes=1 << 16)
SHORT = replace(LIMITS, wall_time_s=2.0)
OUTSIDE = Path(__file__).with_name("written_from_inside")
PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "7", {"tests": [{"input": "3 4\n", "output": "7"}]})

HOSTILE = {
    "loops for ever": ("while True: pass", "CPU time"),
    "sleeps for ever": ("import time; time.sleep(99)", "wall time"),
    "loops and ignores signals": (
        "import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "CPU time",
    ),
    "closes its output and sleeps": ("import os, time; os.close(1); os.close(2); time.sleep(99)", "wall time"),
    "forks": ("import os\nwhile True: os.fork()", "start a process"),
    "starts a session of its own": ("import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass", "process"),
    "runs a command": ("import subprocess; subprocess.run(['sleep', '99'])", "start a process"),
    "eats memory": ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
    "prints without end": ("while True: print('x' * 1000)", "output"),
    "writes a large file": ("open('large', 'w').write('x' * 10**7)", "File too large"),
    "writes outside": (f"open({str(OUTSIDE)!r}, 'w').write('x')", "PermissionError"),
    "writes through a link": (f"import os; os.symlink({str(OUTSIDE)!r}, 'l'); open('l', 'w')", "PermissionError"),
    "removes a file": (f"import os; os.remove({__file__!r})", "PermissionError"),
    "cuts a file": (f"import os; os.truncate({__file__!r}, 0)", "PermissionError"),
    "changes a mode": (f"import os; os.chmod({__file__!r}, 0)", "PermissionError"),
    "reads what it is judged by": (f"open({__file__!r}).read()", "PermissionError"),
    "opens a socket": ("import socket; socket.socket()", "PermissionError"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "raises its limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "not allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_stopped(name):
    program, reason = HOSTILE[name]
    before, started = Path(__file__).read_bytes(), time.monotonic()
    limits = SHORT if reason == "wall time" else LIMITS
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    outcome = run_program(program, "", limits)
    assert outcome.failure is not None
    assert reason in outcome.failure
    assert time.monotonic() - started < limits.wall_time_s + 3.0
    assert not OUTSIDE.exists()
    assert Path(__file__).read_bytes() == before
    left = {child.pid for child in psutil.Process().children(recursive=True)}
    assert left <= others, "something of it is left"


def test_an_honest_program_runs():
    program = (
        "import json, math, tempfile, threading\n"
        "a, b = map(int, input().split())\n"
        "thread = threading.Thread(target=lambda: print(a + b)); thread.start(); thread.join()\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
        "open('own', 'w').write('y'); print(open('own').read())\n"
    )
    assert run_program(program, "3 4\n", LIMITS) == (outcome := run_program(program, "3 4\n", LIMITS))
    assert (outcome.output, outcome.failure) == (b"7\ny\n", None)
    assert run_program("raise SystemExit(3)", "", LIMITS).failure == "exit code 3"


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("```python\na, b = map(int, input().split())\nprint(a + b)\n```", 1.0),
        ("print(sum(map(int, input().split())))", 1.0),
        ("```\nprint(8)\n```", 0.0),
        ("```python\nwhile True: pass\n```", 0.0),
        ("```python\nprint(7); raise ValueError\n```", 0.0),
    ],
)
def test_programs_are_scored_by_what_they_print(response, score):
    reward = build_reward({"code": {"limits": {"wall_time_s": 60, "cpu_time_s": 1}}}, None, RewardEngines())
    assert reward([Completion(PROBLEM, response, 1)] * 2) == [score, score]


def test_test_code_and_partial_credit():
    def score(problem, response, **options):
        return build_reward({"code": options}, None, None)([Completion(problem, response, 1)])[0]

    by_code = Problem("p", PROBLEM.messages, "", {"test_code": "assert f(2) == 4"})
    assert score(by_code, "def f(x): return x * 2") == 1.0
    assert score(by_code, "def f(x): return x") == 0.0
    assert score(by_code, "import os; os._exit(0)") == 0.0
    two = Problem("p", PROBLEM.messages, "", {"tests": [{"input": "1", "output": "1"}, {"input": "2", "output": "4"}]})
    assert score(two, "print(input())", partial=True) == 0.5
    assert score(two, "print(input())") == 0.0
    with pytest.raises(ValueError, match="has neither 'tests' nor 'test_code'"):
        score(Problem("p", PROBLEM.messages, ""), "print(1)")
