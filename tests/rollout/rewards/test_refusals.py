"""What reaches others is refused from within a sandbox, in each kind of it, as root and as nobody; nothing is left."""

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

from lockstep.rollout.rewards import isolation
from lockstep.rollout.rewards.isolation import Limits, Outcome, run_program
from lockstep.rollout.rewards.verifiers import Verifier, VerifierPool
from lockstep.rollout.tasks import Problem

LIMITS = Limits(wall_time_s=60.0, cpu_time_s=10, memory_bytes=1 << 29)
OUTSIDE = Path(__file__).with_name("written_from_inside")

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


ANSWERS = {
    "that it cannot be confined": '[0.0, {"cannot_confine": "x"}]',
    "how it ended": '[0.0, {"exit": 0}]',
    "a list": "[0.0, [1]]",
    "no number": '["1.0", null]',
    "a score without a number": "[NaN, null]",
    "nothing": "[",
    "deep": "[" * 9000,
}
ANSWERING = """
import os
def score(problem, text):
    if text == "escape": raise ValueError("\\x1b[2J\\x1b]0;title\\x07gone")
    if text == "honest": return 1.0
    for descriptor in range(3, 64):
        try: os.write(descriptor, text.encode() + b"\\n")
        except OSError: pass
    os._exit(0)
"""


def test_no_answer_of_a_judged_function_is_more_than_its_own_failure(sandbox, tmp_path):
    (tmp_path / "mine.py").write_text(ANSWERING)
    problem = Problem("p", ({"role": "user", "content": "?"},), "7")
    texts = [*ANSWERS.values(), "escape", "honest"]
    pool = VerifierPool(Verifier("mine", f"{tmp_path}/mine.py:score", limits=replace(LIMITS, sandbox=sandbox)))
    scores = pool.verify([(problem, text) for text in texts])
    pool.close()
    assert [float(score) for score in scores] == [0.0] * (len(texts) - 1) + [1.0]
    assert all(score.reason.isprintable() for score in scores[:-1])


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


def test_a_program_ends_with_the_process_that_started_it(sandbox):
    run = os.fork()
    if run == 0:
        try:
            run_program("import time; time.sleep(99)", "", replace(LIMITS, sandbox=sandbox))
        finally:
            os._exit(0)
    deadline, started = time.monotonic() + 60.0, []
    while len(started) < (4 if sandbox == "bubblewrap" else 2):  # bubblewrap's two, ours, and the program
        assert time.monotonic() < deadline
        started = psutil.Process(run).children(recursive=True)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert psutil.wait_procs(started, timeout=30.0)[1] == []
