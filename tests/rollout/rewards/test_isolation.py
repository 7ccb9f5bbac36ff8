"""Whatever a judged program does, it is stopped at a limit, says why, and harms nothing, in each kind of sandbox."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lockstep.rollout.rewards import RewardEngines, build_reward, isolation
from lockstep.rollout.rewards.isolation import IsolationError, Limits, Outcome, remove_tree, run_program
from lockstep.rollout.rewards.verifiers import Verifier, VerifierPool
from lockstep.rollout.tasks import Problem

# A busy machine may take seconds to start a process: the wall clock is short only where it is what stops one.
LIMITS = Limits(wall_time_s=60.0, cpu_time_s=1, memory_bytes=1 << 29, file_bytes=1 << 20, output_bytes=1 << 16)
SHORT = replace(LIMITS, wall_time_s=1.0)
OUTSIDE = Path(__file__).with_name("written_from_inside")


@pytest.fixture(params=["bubblewrap", "landlock"])
def sandbox(request):
    if why := isolation.why_not(request.param):
        pytest.skip(why)
    return request.param


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


# Each is tried in a sandbox of its own program, where it must raise OSError. `pid` is this process, `call` syscall(2).
REFUSED = {
    "owner of a pipe": "fcntl.fcntl(r, F_SETOWN, pid)",
    "owner of a pipe, a group": "fcntl.fcntl(r, F_SETOWN, -pid)",
    "owner of a pipe, extended": "fcntl.fcntl(r, F_SETOWN_EX, struct.pack('ii', 1, pid))",
    "signal of a pipe": "fcntl.fcntl(r, F_SETSIG, 9)",
    "signals of a pipe on": "fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | 0o20000)",
    "owner of a socket": "fcntl.ioctl(pair[0], 0x8901, struct.pack('i', pid))",
    "owner of a socket, the other name": "fcntl.ioctl(pair[0], 0x8902, struct.pack('i', pid))",
    "signals of a socket on": "fcntl.ioctl(pair[0], 0x5452, struct.pack('i', 1))",
    "typing into a terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "a lease": "fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_WRLCK)",
    "news of a directory": "fcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, 7)",
    "a larger pipe": "fcntl.fcntl(r, 1031, 1 << 20)",
    "no end with the parent": "prctl(1, 0)",
    "memory that others may read": "prctl(4, 1)",
    "a tracer": "prctl(0x59616d61, -1)",
    "a subreaper": "prctl(36, 1)",
    "System V memory": "call(29, 7, 1 << 30, 0o1666)",
    "a System V semaphore": "call(64, 7, 1, 0o1666)",
    "a System V queue": "call(68, 7, 0o1666)",
    "a key": "call(248, b'user', b'name', b'x', 1, -4)",
    "a keyring": "call(250, 0, -3, 1)",
    "a POSIX queue": "call(240, b'name', 0o102, 0o666, None)",
    "a file without a name": "os.memfd_create('x')",
    "secret memory": "call(447, 0)",
    "shared memory": "open('/dev/shm/x', 'w')",
    "locked memory": "call(149, 0, 4096)",
    "a socket": "socket.socket()",
    "an abstract socket": "socket.socket(socket.AF_UNIX).bind('\\0name')",
    "a pair of datagram sockets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "a name for a socket": "pair[0].bind('\\0name')",
    "passing a descriptor": "socket.send_fds(pair[0], [b'x'], [r])",
    "the end of the parent": "os.kill(pid, 9)",
    "the end of its own parent": "os.kill(os.getppid(), 9)",
    "the end of its group": "os.killpg(0, 9)",
    "the end of all": "os.kill(-1, 9)",
    "a signal by thread": "call(200, pid, 9)",
    "a signal by process and thread": "call(234, pid, pid, 9)",
    "a queued signal": "call(129, pid, 9, bytes(128))",
    "a signal by descriptor": "os.pidfd_open(pid)",
    "a timer that signals another": "call(222, 0, struct.pack('qiii', 0, 9, 4, pid), bytes(8))",
    "tracing": "call(101, 16, pid, 0, 0)",
    "another's memory": "call(310, pid, bytes(16), 1, bytes(16), 1, 0)",
    "another's memory as a file": "open(f'/proc/{pid}/mem')",
    "another's environment": "open(f'/proc/{pid}/environ')",
    "its parent's memory": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "another's limits": "resource.prlimit(pid, resource.RLIMIT_CPU)",
    "another's priority": "os.setpriority(os.PRIO_PROCESS, pid, 19)",
    "another's processors": "os.sched_setaffinity(pid, [0])",
    "another's order": "os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))",
    "another session": "os.setsid()",
    "another group": "os.setpgid(0, 0)",
    "a namespace": "call(272, 0x10000000)",
    "another's namespace": "call(308, r, 0)",
    "a mount": "call(165, b'a', b'b', b'tmpfs', 0, None)",
    "another root": "os.chroot('.')",
    "io_uring": "call(425, 1, bytes(120))",
    "page faults": "call(323, 0)",
    "counters": "call(298, bytes(128), 0, -1, -1, 0)",
    "a program in the kernel": "call(321, 0, bytes(128), 128)",
    "another kernel": "call(246, 0, 0, 0, 0)",
    "another personality": "call(135, 0x0400000)",
    "a second filter": "call(317, 1, 0, bytes(16))",
    "watching files": "call(253)",
    "watching a mount": "call(300, 0, 0)",
    "a file by handle": "call(304, -100, bytes(16), 0)",
    "a device": "os.mknod('null', 0o20666, os.makedev(1, 3))",
    "a named pipe": "os.mkfifo('pipe')",
    "a second name": "os.link(outside, 'link')",
    "writing outside": "open(outside, 'w')",
    "writing through a link": "(os.symlink(outside, 'l'), open('l', 'w'))",
    "removing outside": "os.remove(judge)",
    "moving outside": "os.rename(judge, 'x')",
    "cutting outside": "os.truncate(judge, 0)",
    "a mode outside": "os.chmod(judge, 0)",
    "a mode by descriptor": "os.fchmod(own, 0o4777)",
    "a time outside": "os.utime(judge)",
    "an owner outside": "os.chown(judge, 1, 1)",
    "what it is judged by": "open(judge)",
    "the program's input file": "open(os.path.join(os.getcwd(), '..', 'stdin'))",
    "the input for writing": "os.write(0, b'x')",
    "a host name": "socket.sethostname('x')",
    "other rights": "os.setuid(1)",
    "no descriptor beyond the standard ones": "os.fstat((inherited or [63])[0])",
}

SET_UP = """
import ctypes, fcntl, json, os, resource, socket, struct
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), 'refused')
def call(*arguments): return checked(libc.syscall(*arguments))
def prctl(*arguments): return checked(libc.prctl(*arguments))
def readable(descriptor):
    try:
        return bool(os.fstat(descriptor))
    except OSError:
        return False
inherited = [number for number in range(3, 64) if readable(number)]
(r, w), pair, own = os.pipe(), socket.socketpair(), os.open('own', os.O_RDWR | os.O_CREAT)
"""
TRY_ALL = f"""
{SET_UP}
pid, outside, judge, expressions = json.loads(input())
results = {{}}
for name, expression in expressions.items():
    try:
        eval(expression)
        results[name] = 'it went through'
    except OSError:
        results[name] = ''
    except BaseException as error:
        results[name] = repr(error)
print(json.dumps(results))
"""


# A function that may read any file, and has its input and a pipe for its own result.
ALLOWED_TO_FUNCTIONS = (
    "what it is judged by", "the program's input file", "the input for writing",
    "no descriptor beyond the standard ones",
)  # fmt: skip
FUNCTION = """
def score(problem, text):
    names = dict(problem.metadata)
    exec(SET_UP, names)
    try:
        eval(text, names)
    except OSError:
        return 1.0
    return 0.0
"""


@pytest.fixture
def caught_signals():
    """What arrives at this process meanwhile of the signals that a descriptor's owner gets."""
    caught = []
    numbers = (signal.SIGIO, signal.SIGURG, signal.SIGUSR1)
    old = {number: signal.signal(number, lambda received, _: caught.append(received)) for number in numbers}
    yield caught
    for number, handler in old.items():
        signal.signal(number, handler)


def _left_on_this_machine() -> dict:
    kinds = ("sysvipc/shm", "sysvipc/sem", "sysvipc/msg")
    return {
        **{kind: Path("/proc", kind).read_text().splitlines()[1:] for kind in kinds},
        "sockets": {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@name" in line},
        "shared memory": sorted(os.listdir("/dev/shm")),
        "children": {child.pid for child in psutil.Process().children(recursive=True)},
        "host name": socket.gethostname(),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": os.sched_getaffinity(0),
        "judge": (Path(__file__).read_bytes(), os.stat(__file__)[:9]),
        "outside": OUTSIDE.exists(),
    }


def _run_as_nobody(program: str, stdin: str, limits: Limits) -> Outcome:
    """From a child of this process, by Debian's Python: nobody may not read root's."""
    python = "/usr/bin/python3"
    if os.getuid() != 0 or not os.path.exists(python):
        pytest.skip("needs to be root, and a Python that all may run")
    path = json.loads(subprocess.check_output([python, "-I", "-c", "import json, sys; print(json.dumps(sys.path))"]))
    public = Path(tempfile.mkdtemp())
    public.chmod(0o755)
    main = public / "isolated_main.py"
    shutil.copyfile(isolation._MAIN, main)
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "executable", python)
                patch.setattr(isolation, "_MAIN", main)
                patch.setattr(isolation, "_library_path", lambda: (path, [*isolation._SYSTEM, *path]))
                outcome = run_program(program, stdin, limits)
            os.write(writer, json.dumps([outcome.output.decode(), outcome.failure]).encode())
        except BaseException as error:
            os.write(writer, json.dumps(["", repr(error)]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        output, failure = json.loads(file.read())
    os.wait()
    shutil.rmtree(public)
    return Outcome(output.encode(), failure)


@pytest.mark.parametrize("user", ["own", "nobody"])
def test_what_reaches_others_is_refused_and_nothing_is_left(user, sandbox, caught_signals, tmp_path):
    before = _left_on_this_machine()
    job = json.dumps([os.getpid(), str(OUTSIDE), __file__, REFUSED])
    limits = replace(LIMITS, sandbox=sandbox)
    outcome = run_program(TRY_ALL, job, limits) if user == "own" else _run_as_nobody(TRY_ALL, job, limits)
    assert outcome.failure is None
    results = json.loads(outcome.output)
    assert {name: result for name, result in results.items() if result} == {}
    assert results.keys() == REFUSED.keys()
    deadline = time.monotonic() + 10.0
    while (after := _left_on_this_machine()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after == before
    assert not caught_signals


def test_a_function_reaches_others_as_little(sandbox, caught_signals, tmp_path):
    (tmp_path / "mine.py").write_text(f"SET_UP = {SET_UP!r}\n{FUNCTION}")
    before = _left_on_this_machine()
    names = {"pid": os.getpid(), "outside": str(OUTSIDE), "judge": __file__}
    problem = Problem("p", ({"role": "user", "content": "?"},), "7", names)
    tried = {name: expression for name, expression in REFUSED.items() if name not in ALLOWED_TO_FUNCTIONS}
    pool = VerifierPool(Verifier("mine", f"{tmp_path}/mine.py:score", limits=replace(LIMITS, sandbox=sandbox)))
    scores = dict(zip(tried, pool.verify([(problem, expression) for expression in tried.values()]), strict=True))
    pool.close()
    assert {name: getattr(score, "reason", score) for name, score in scores.items() if score != 1.0} == {}
    assert _left_on_this_machine() == before
    assert not caught_signals


# What the newest kernel's answer is replaced by, and in which sandbox the same is refused all the same.
OLD_KERNELS = {
    "no Landlock": ("bubblewrap", "return max(0, _libc.syscall(_LANDLOCK_CREATE, None, 0, 1))", "return 0"),
    "Landlock 1": (
        "landlock",
        "version = _check(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1),",
        "version = 1 or (",
    ),
}


@pytest.mark.parametrize("kernel", OLD_KERNELS)
def test_older_kernels_refuse_the_same(kernel, tmp_path, monkeypatch, caught_signals):
    sandbox, old, new = OLD_KERNELS[kernel]
    if why := isolation.why_not(sandbox):
        pytest.skip(why)
    source = isolation._MAIN.read_text()
    assert old in source
    for name in ("isolated_main.py", "remote_tests.py"):
        shutil.copyfile(isolation._MAIN.with_name(name), tmp_path / name)
    (tmp_path / "isolated_main.py").write_text(source.replace(old, new))
    monkeypatch.setattr(isolation, "_MAIN", tmp_path / "isolated_main.py")
    before = _left_on_this_machine()
    job = json.dumps([os.getpid(), str(OUTSIDE), __file__, REFUSED])
    outcome = run_program(TRY_ALL, job, replace(LIMITS, sandbox=sandbox))
    assert outcome.failure is None
    assert {name: result for name, result in json.loads(outcome.output).items() if result} == {}
    assert _left_on_this_machine() == before
    assert not caught_signals


OTHER_INTERFACES = {
    "32-bit": "b8 14 00 00 00 cd 80 c3",  # mov eax, 20 (getpid); int 0x80; ret
    "x32": "b8 27 00 00 40 0f 05 c3",  # mov eax, 0x40000027 (getpid); syscall; ret
}


@pytest.mark.parametrize("name", OTHER_INTERFACES)
def test_other_interfaces_of_the_kernel_end_the_program(name, sandbox):
    program = (
        "import ctypes, mmap\n"
        f"code = mmap.mmap(-1, 4096, prot=7); code.write(bytes.fromhex({OTHER_INTERFACES[name]!r}))\n"
        "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()\n"
    )
    outcome = run_program(program, "", replace(LIMITS, sandbox=sandbox))
    assert outcome.failure is not None
    assert "SIGSYS" in outcome.failure


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
import math_verify, networkx, numpy, pandas, reasoning_gym, sympy
x = sympy.symbols('x')
results = []
def work(n): results.append(numpy.linalg.norm(numpy.ones((200, 200)) @ numpy.ones((200, 200))) > 0 and n)
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(sum(results), sympy.integrate(sympy.exp(-x**2), (x, -sympy.oo, sympy.oo)))
print(math_verify.verify(math_verify.parse('$1/2$'), math_verify.parse('$0.5$')))
data = reasoning_gym.create_dataset('chain_sum', size=1, seed=1)
print(data.score_answer(data[0]['answer'], data[0]), pandas.DataFrame({'a': [1, 2]}).a.sum())
"""


def test_libraries_of_mathematics_run():
    """In the sandbox that this machine uses; the list of calls is the same in both."""
    limits = replace(LIMITS, cpu_time_s=60, memory_bytes=1 << 33, num_threads=64)
    outcome = run_program(LIBRARIES, "", limits)
    assert (outcome.output.decode(), outcome.failure) == ("28 sqrt(pi)\nTrue\n1.0 3\n", None)


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
