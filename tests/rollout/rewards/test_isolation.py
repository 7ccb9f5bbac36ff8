"""Whatever a judged program does, it is stopped at a limit, says why, and harms nothing, in each kind of sandbox."""

import contextlib
import os
import tempfile
import time
from dataclasses import replace

import pytest

from lockstep.rollout.rewards import RewardEngines, build_reward, isolation
from lockstep.rollout.rewards.isolation import IsolationError, Limits, remove_tree, run_program
from lockstep.rollout.rewards.verifiers import Verifier, VerifierPool
from lockstep.rollout.tasks import Problem

# A busy machine may take seconds to start a process: the wall clock is short only where it is what stops one.
LIMITS = Limits(wall_time_s=60.0, cpu_time_s=1, memory_bytes=1 << 29, file_bytes=1 << 20, output_bytes=1 << 16)
SHORT = replace(LIMITS, wall_time_s=1.0)


STOPPED = {
    "loops for ever": ("while True: pass", "CPU time"),
    "sleeps for ever": ("import time; time.sleep(99)", "wall time"),
    "writes a byte now and then": (
        "import os, time\nwhile True:\n    os.write(1, b'1'); os.write(2, b'1'); time.sleep(0.2)",
        "wall time",
    ),
    "loops and ignores signals": (
        "import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "CPU time",
    ),
    "closes its output and sleeps": ("import os, time; os.close(1); os.close(2); time.sleep(99)", "wall time"),
    "forks": ("import os\nwhile True: os.fork()", "PermissionError"),
    "runs a command": ("import subprocess; subprocess.run(['sleep', '99'])", "PermissionError"),
    "becomes another program": ("import os; os.execv('/bin/sh', ['sh'])", "PermissionError"),
    "eats memory": ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
    "prints without end": ("while True: print('x' * 1000)", "output"),
    "writes a large file": ("open('large', 'w').write('x' * 10**7)", "File too large"),
    "writes many files": ("for i in range(10**6): open(str(i), 'w').close()", "files: more than 1000"),
    "nests directories": (
        "import os\nfor _ in range(500):\n    os.mkdir('d' * 99); os.chdir('d' * 99)\n"
        "for i in range(600): os.mkdir(str(i), 0)\nwhile True: pass",
        "files: ",
    ),
    "starts many threads": (
        "import threading\nthreading.stack_size(1 << 15)\nwait = threading.Event()\n"
        "while True: threading.Thread(target=wait.wait, daemon=True).start()",
        "threads: more than 128",
    ),
    "raises its limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "not allowed"),
    "ends as one that could not be confined": ("import os; os._exit(97)", "exit code 97"),
    "is no text": ("x = '\ud800'", "surrogates not allowed"),
    "writes to the terminal": ("import sys; sys.exit('\\x1b]0;title\\x07\\x1b[2Jgone')", "]0;title"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_hostile_program_is_stopped(name, sandbox):
    program, reason = STOPPED[name]
    started = time.monotonic()
    limits = replace(SHORT if reason == "wall time" else LIMITS, sandbox=sandbox)
    if reason.startswith("files"):
        limits = replace(limits, cpu_time_s=30)
    outcome = run_program(program, "", limits)
    assert outcome.failure is not None
    assert reason in outcome.failure
    assert outcome.failure.isprintable()
    assert time.monotonic() - started < limits.wall_time_s + 20.0


HONEST = """
import asyncio, concurrent.futures, dataclasses, json, math, os, pickle, random, shutil, signal, sqlite3, sys, tempfile
import threading, time
a, b = map(int, input().split())
thread = threading.Thread(target=lambda: print(a + b)); thread.start(); thread.join()
with tempfile.TemporaryFile() as file: file.write(b'x')
with tempfile.TemporaryDirectory() as folder: open(os.path.join(folder, 'f'), 'w').write('y')
open('own', 'w').write('y'); shutil.copyfile('own', 'other'); os.rename('other', 'third'); print(open('third').read())
async def both():
    first, second = await asyncio.gather(asyncio.sleep(0.01, 1), asyncio.to_thread(lambda: 2))
    return first + second
print(asyncio.run(both()))
with concurrent.futures.ThreadPoolExecutor(4) as pool: print(sum(pool.map(math.sqrt, [1, 4, 9])))
with sqlite3.connect('table.db') as table: print(table.execute('select 1').fetchone())
table.execute('create table t(a)'); table.commit()
@dataclasses.dataclass
class Point: x: int = 1
print(pickle.loads(pickle.dumps(Point())))
signal.signal(signal.SIGALRM, lambda *_: print('alarm')); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
signal.signal(signal.SIGUSR1, lambda *_: print('own')); os.kill(os.getpid(), signal.SIGUSR1)
import numpy; print(numpy.linalg.solve(numpy.eye(40), numpy.ones(40)).sum())
import atexit; atexit.register(print, 'end')
threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()
"""


def test_an_honest_program_runs(sandbox):
    outcome = run_program(HONEST, "3 4\n", replace(LIMITS, sandbox=sandbox, cpu_time_s=20, memory_bytes=1 << 31))
    lines = ["7", "y", "3", "6.0", "(1,)", "Point(x=1)", "alarm", "own", "40.0", "late", "end"]
    assert (outcome.output.decode().splitlines(), outcome.failure) == (lines, None)


LIBRARIES = """
import threading
import networkx, numpy, reasoning_gym, sympy
from latex2sympy2_extended import latex2sympy
x = sympy.symbols('x')
results = []
def work(n): results.append(numpy.linalg.norm(numpy.ones((200, 200)) @ numpy.ones((200, 200))) > 0 and n)
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(sum(results), sympy.integrate(sympy.exp(-x**2), (x, -sympy.oo, sympy.oo)))
print(latex2sympy('3'))
data = reasoning_gym.create_dataset('chain_sum', size=1, seed=1)
print(data.score_answer(data[0]['answer'], data[0]))
"""


def test_libraries_of_mathematics_run():
    """In the sandbox that this machine uses; the list of calls is the same in both."""
    limits = replace(LIMITS, cpu_time_s=60, memory_bytes=1 << 33, num_threads=64)
    outcome = run_program(LIBRARIES, "", limits)
    assert (outcome.output.decode(), outcome.failure) == ("28 sqrt(pi)\n3\n1.0\n", None)


def test_exit_codes_are_kept(sandbox):
    limits = replace(LIMITS, sandbox=sandbox)
    assert run_program("raise SystemExit(3)", "", limits).failure == "exit code 3"
    assert run_program("import os; os.abort()", "", limits).failure == "stopped by SIGABRT: a fault of its own"
    assert run_program("raise SystemExit(0)", "", limits).failure is None


def test_any_tree_is_removed(tmp_path):
    """Deeper than Python recurses and longer than a path may be, with files that lead elsewhere."""
    kept, tree = tmp_path / "kept", tmp_path / "tree"
    kept.mkdir()
    (kept / "file").write_text("x")
    tree.mkdir()
    inner = os.open(tree, os.O_RDONLY)
    for level in range(1200):
        for name in ("dddddddddddddddd", "e")[: 1 + (level % 100 == 0)]:
            os.mkdir(name, dir_fd=inner)
        if level % 100 == 0:
            os.symlink(kept, "link", dir_fd=inner)
            os.link(kept / "file", "second", dst_dir_fd=inner)
        below = os.open("dddddddddddddddd", os.O_RDONLY, dir_fd=inner)
        os.close(inner)
        inner = below
    os.mkdir("closed", 0, dir_fd=inner)
    os.close(inner)
    remove_tree(tree)
    assert sorted(tmp_path.iterdir()) == [kept]
    assert (kept / "file").read_text() == "x"


def test_the_judged_program_leaves_no_file(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os\nfor _ in range(900):\n    os.mkdir('d'); open('f', 'w').write('x' * 5000); os.chdir('d')\n"
        "os.umask(0o777); os.mkdir('closed')"
    )
    outcome = run_program(program, "", replace(LIMITS, sandbox=sandbox, num_files=10**6, disk_bytes=1 << 30))
    assert outcome.failure is None
    assert list(tmp_path.iterdir()) == []


def test_all_that_it_writes_is_bounded(sandbox):
    program = "for i in range(100):\n    open(str(i), 'w').write('x' * 10**5)\nimport time; time.sleep(99)"
    outcome = run_program(program, "", replace(LIMITS, sandbox=sandbox, disk_bytes=1 << 20, wall_time_s=20.0))
    assert outcome.failure is not None
    assert "disk: more than 1048576 bytes" in outcome.failure or "No space left" in outcome.failure


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({}, "isolation: bubblewrap"),
        ({"bubblewrap": "not installed"}, "isolation: Landlock + seccomp"),
        ({"bubblewrap": "not installed", "landlock": "no Landlock"}, None),
    ],
)
def test_what_protects_this_machine_is_said(broken, said, monkeypatch, caplog):
    monkeypatch.setattr(isolation, "why_not", lambda name: broken.get(name, ""))
    isolation._say.cache_clear()
    with caplog.at_level("INFO", logger="lockstep"), contextlib.suppress(ValueError):
        for _ in range(2):
            build_reward({"code": 1.0}, None, RewardEngines())
    assert [record.message.startswith(said) for record in caplog.records] == ([True] if said else [])
    isolation._say.cache_clear()
    if said is None:
        with pytest.raises(IsolationError, match="bubblewrap: not installed; landlock: no Landlock"):
            isolation.protection()
    else:
        assert isolation.protection().startswith(said)
        assert all(reason in isolation.protection() for reason in broken.values())


def test_a_sandbox_that_does_not_work_is_found_by_trying_it(tmp_path, monkeypatch):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "No permissions to create new namespace" in isolation.why_not.__wrapped__("bubblewrap")
    monkeypatch.setenv("PATH", "")
    assert "apt-get install bubblewrap" in isolation.why_not.__wrapped__("bubblewrap")


@pytest.mark.parametrize("machine", [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_other_machines_are_refused_by_name(machine, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: machine[0])
    monkeypatch.setattr("platform.machine", lambda: machine[1])
    for sandbox in ("bubblewrap", "landlock"):
        reason = isolation.why_not.__wrapped__(sandbox)
        assert reason == f"isolation is written for Linux on x86-64, not {machine[0]} on {machine[1]}"


def test_without_a_sandbox_only_what_needs_none_is_judged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(isolation, "why_not", lambda name: "not here")
    isolation._say.cache_clear()
    (tmp_path / "mine.py").write_text("def score(problem, text): return len(text)\n")
    verifier = Verifier("mine", f"{tmp_path}/mine.py:score", must_confine=False)
    pool = VerifierPool(verifier)
    assert pool.verify([(Problem("p", ({"role": "user", "content": "?"},), "7"), "four")]) == [4.0]
    pool.close()
    assert "isolation: none on this machine; not here" in caplog.text
    with pytest.raises(IsolationError, match="this machine cannot isolate a process"):
        VerifierPool(replace(verifier, must_confine=True)).open()
    isolation._say.cache_clear()


def test_an_unknown_sandbox_is_refused():
    with pytest.raises(ValueError, match=r"limits.sandbox must be one of auto, bubblewrap, landlock, got 'none'"):
        Limits(sandbox="none")
    with pytest.raises(ValueError, match=r"limits.disk_bytes must be positive, got 0"):
        Limits(disk_bytes=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("wall_time_s", value) for value in (float("inf"), float("nan"), "5")),
        *(("cpu_time_s", 0.5), ("memory_bytes", 1e9), ("memory_bytes", 1 << 70), ("num_files", True)),
    ],
)
def test_limits_that_no_kernel_takes_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"limits.{name} must be "):
        Limits(**{name: value})


@pytest.mark.parametrize("asked", ["bubblewrap", "landlock"])
def test_a_limit_insists_on_one_sandbox(asked, monkeypatch):
    other = {"bubblewrap": "landlock", "landlock": "bubblewrap"}[asked]
    monkeypatch.setattr(isolation, "why_not", lambda name: "broken" if name == asked else "")
    assert isolation._resolved("auto") == other
    with pytest.raises(IsolationError, match=rf"cannot isolate a process \({asked}: broken\)"):
        run_program("print(1)", "", Limits(sandbox=asked))
    monkeypatch.setattr(isolation, "why_not", lambda name: "broken" if name == other else "")
    assert isolation._resolved(asked) == asked


def test_without_libseccomp_it_is_the_same_and_said(sandbox, monkeypatch):
    monkeypatch.setattr(isolation.call_filter, "pyseccomp", None)
    isolation.call_filter.filter_of.cache_clear()
    try:
        program = "import socket\ntry: socket.socket()\nexcept PermissionError: print('refused')"
        assert run_program(program, "", Limits(sandbox=sandbox)).output == b"refused\n"
        assert "(without libseccomp)" in isolation.protection(Limits(sandbox=sandbox))
    finally:
        isolation.call_filter.filter_of.cache_clear()


LOCKS = """
import fcntl
with open({path!r}, {mode!r}) as file:
    for name, lock in (("lockf", fcntl.lockf), ("flock", fcntl.flock)):
        try:
            lock(file, {kind} | fcntl.LOCK_NB)
            found[name] = "locked"
        except PermissionError:
            found[name] = "refused"
"""


def test_only_a_program_locks_files(sandbox, tmp_path):
    program = "found = {}" + LOCKS.format(path="own", mode="w", kind="fcntl.LOCK_EX") + "print(sorted(found.items()))"
    done = run_program(program, "", Limits(sandbox=sandbox))
    assert done.output == b"[('flock', 'locked'), ('lockf', 'locked')]\n"
    (tmp_path / "yours").touch()
    body = LOCKS.format(path=str(tmp_path / "yours"), mode="r", kind="fcntl.LOCK_SH").replace("\n", "\n    ")
    (tmp_path / "judge.py").write_text(
        f"def judge(problem, response):\n    found = {{}}{body}\n"
        "    return float(found == {'lockf': 'refused', 'flock': 'refused'})\n"
    )
    verifier = Verifier("judge", f"{tmp_path}/judge.py:judge", limits=Limits(sandbox=sandbox))
    pool = VerifierPool(verifier)
    try:
        assert pool.verify([(Problem("p/0", ({"role": "user", "content": "?"},), "1"), "x")]) == [1.0]
    finally:
        pool.close()


def test_files_without_a_name_are_bounded_by_their_number_and_size(sandbox):
    program = """
import errno, os, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
opened, sizes = [], []
try:
    while True:
        opened.append(os.open("f", os.O_CREAT | os.O_RDWR))
        os.unlink("f")
        try:
            for _ in range(3):
                os.write(opened[-1], bytes(4096))
        except OSError as error:
            assert error.errno == errno.EFBIG
        sizes.append(os.fstat(opened[-1]).st_size)
except OSError as error:
    print(errno.errorcode[error.errno], len(opened) < 64, max(sizes))
"""
    done = run_program(program, "", Limits(sandbox=sandbox, file_bytes=8192))
    assert done.output == b"EMFILE True 8192\n", done
