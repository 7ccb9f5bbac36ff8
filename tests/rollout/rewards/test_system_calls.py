"""The list of system calls is whole, both ways to a filter agree, and a kernel that has it does what the list says."""

import errno
import json
import os
import random
import signal
import socket
import struct
from pathlib import Path

import pytest

from lockstep.rollout.rewards import call_filter, isolation
from lockstep.rollout.rewards.isolation import Limits
from lockstep.rollout.rewards.system_calls import (
    ALLOW,
    END_OF_TABLE,
    NUMBERS,
    OWN_PID,
    REFUSE,
    UNKNOWN,
    reasons,
    rules,
)

ROOT = Path(__file__).parents[3]

PROFILES = ("supervisor", "function", "program")
SUPPORT = Path(__file__).parents[2] / "support"
X86_64, I386 = 0xC000003E, 0x40000003
ERRNO = 0x00050000
KILLED = 0x80000000
needs_libseccomp = pytest.mark.skipif(not call_filter.has_libseccomp(), reason="needs libseccomp")


def _run(filter_bytes: bytes, number: int, arguments=(0,) * 6, arch: int = X86_64) -> int:
    """What the kernel's interpreter of the filter returns."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *(value & 0xFFFFFFFFFFFFFFFF for value in arguments))
    program = list(struct.iter_unpack("<HBBI", filter_bytes))
    accumulator, position = 0, 0
    while True:
        code, yes, no, value = program[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            position += value
        elif code == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}[code]
            position += yes if holds else no


def test_every_call_is_in_one_group_and_has_a_reason():
    table = reasons()
    assert table.keys() == NUMBERS.keys()
    assert {*range(337), *range(424, 471)} == set(NUMBERS.values())
    assert all(action in (ALLOW, REFUSE, UNKNOWN, "allow some") and reason for action, reason in table.values())
    listed = [rule.name for rule in rules("function") if not rule.conditions]
    assert len(listed) == len(set(listed)), "in two groups"


def test_the_docs_list_what_the_code_does():
    text = (ROOT / "docs" / "security.md").read_text()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line[:1] == "|"]
    written = {name: row[0] for row in rows if len(row) == 2 for name in row[1].split()}
    some = {row[0]: row[2] for row in rows if len(row) == 3}
    for name, (action, reason) in reasons().items():
        assert (some if action == "allow some" else written)[name] == reason, name


@needs_libseccomp
def test_the_numbers_are_those_of_libseccomp():
    known = {}
    for name, number in NUMBERS.items():
        try:
            known[name] = call_filter.pyseccomp.resolve_syscall(call_filter.pyseccomp.Arch.X86_64, number).decode()
        except Exception:  # newer than the library
            assert number > 420 or name in ("uprobe", "uretprobe"), name
    assert len(known) > 350
    assert all(theirs == name for name, theirs in known.items())


# Newer kernels pass these by every filter, and end a process that calls them from elsewhere than a probe.
BY_THE_KERNEL = (NUMBERS["uretprobe"], NUMBERS["uprobe"])

# Arguments on both sides of each condition, bits above 32 included.
CASES = {
    "fcntl": [(3, command, value) for command in (*range(20), 1024, 1025, 1030, 1031, 1033, 1 << 32 | 4)
              for value in (0, 0o20000, 0o24000, 0o4000, 1 << 40)],
    "ioctl": [(0, command) for command in (0x5401, 0x5412, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x5452, 0x8901,
                                           0x8902, 0x802C542A, 0xFFFFFFFF802C542A, 1 << 32 | 0x5401)],
    "prctl": [(option,) for option in (1, 2, 4, 15, 16, 22, 38, 59, 1 << 32 | 15)],
    "clone": [(flags,) for flags in (0x3D0F00, 0x3D0F00 | 1 << 28, 0x3D0F00 | 1 << 33, 0x1200011, 17, 0, 0x10000,
                                     0x10900, 0x4111, 0x3D0F00 | 0x8000)],
    "mmap": [(0, 1, 3, flags) for flags in (0x22, 0x2022, 0x40022, 0x40000022, 1)],
    "socketpair": [(domain, kind) for domain in (1, 2, 16, 1 << 32 | 1) for kind in (1, 2, 5, 0o4001, 0o2000001, 3)],
    "kill": [(pid, 9) for pid in (0, -1, 1, OWN_PID, -OWN_PID, 1 << 32 | OWN_PID)],
    "tgkill": [(pid, 1, 9) for pid in (0, -1, 1, OWN_PID)],
    "prlimit64": [(pid, 7, new) for pid in (0, 5) for new in (0, 1, 1 << 32)],
}  # fmt: skip


@needs_libseccomp
@pytest.mark.parametrize("profile", PROFILES)
def test_both_ways_to_a_filter_decide_alike(profile):
    ours, theirs = call_filter.by_hand(rules(profile)), call_filter.by_libseccomp(rules(profile))
    names = {number: name for name, number in NUMBERS.items()}
    draw = random.Random(7)
    for number in [*range(END_OF_TABLE), 1 << 30, 1 << 30 | 41]:
        cases = [(0,), tuple(draw.getrandbits(64) for _ in range(6)), *CASES.get(names.get(number), [])]
        for arguments in cases:
            padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
            assert _run(ours, number, padded) == _run(theirs, number, padded), (names.get(number), arguments)
    for made in (ours, theirs):
        assert _run(made, 39, arch=I386) == KILLED
        assert _run(made, 1 << 30 | 39) == KILLED


@pytest.mark.parametrize("name", CASES)
def test_arguments_decide(name):
    """Each conditional call by hand: what is allowed of CASES for judged code, and nothing else."""
    allowed = {
        "fcntl": lambda fd, command, value: command in (0, 1, 2, 3, 1030) or (command == 4 and not value & 0o20000),
        "ioctl": lambda fd, command: command in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A),
        "prctl": lambda option: option in (15, 16),
        "clone": lambda flags: flags in (0x3D0F00, 0x10900),
        "mmap": lambda a, b, c, flags: not flags & 0x42000,
        "socketpair": lambda domain, kind: domain == 1 and kind in (1, 0o4001, 0o2000001),
        "kill": lambda pid, number: pid == OWN_PID,
        "tgkill": lambda pid, thread, number: pid == OWN_PID,
        "prlimit64": lambda pid, which, new: pid == 0 and new == 0,
    }[name]
    made = call_filter.filter_of("function")
    for arguments in CASES[name]:
        result = _run(made, NUMBERS[name], (*arguments, 0, 0, 0, 0, 0)[:6])
        assert (result == 0x7FFF0000) == allowed(*arguments), arguments
        assert result in (0x7FFF0000, ERRNO | errno.EPERM, KILLED)


def _system_state(outside: Path) -> dict:
    """What a process could leave behind on this machine."""
    lists = [Path("/proc/sysvipc", name) for name in ("shm", "sem", "msg")]
    return {
        **{str(path): [line.split()[:2] for line in path.read_text().splitlines()] for path in lists},
        "unix": {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@" in line},
        # torch's are of tests in other processes
        "shm": sorted(name for name in os.listdir("/dev/shm") if not name.startswith("torch_")),
        "file": (outside.read_bytes(), outside.stat().st_mode, outside.stat().st_uid, outside.stat().st_mtime_ns),
        "beside": sorted(os.listdir(outside.parent)),
        "hostname": socket.gethostname(),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "affinity": os.sched_getaffinity(0),
        "cwd": os.getcwd(),
    }


def _fuzz(sandbox: str, outside: Path, folder: Path) -> dict:
    actions = {NUMBERS[name]: action for name, (action, _) in reasons().items()}
    returns = [number for number in range(END_OF_TABLE) if actions.get(number, UNKNOWN) in (REFUSE, UNKNOWN)]
    together = [number for number in returns if number not in BY_THE_KERNEL]
    alone = [number for number in range(END_OF_TABLE) if number not in together]
    limits = Limits(sandbox=sandbox, cpu_time_s=1)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            main = SUPPORT / "call_fuzz_main.py"
            process = isolation.start(main, theirs.fileno(), str(folder), limits)
        try:
            job = {
                "confinement": isolation.confinement(limits),
                "path": [str(Path(isolation.__file__).parent)],
                "together": together,
                "alone": alone,
                "may_wait": [number for number in alone if actions.get(number) not in (REFUSE, UNKNOWN)],
                "outside": str(outside),
                "parent": os.getpid(),
            }
            ours.settimeout(300)
            ours.sendall(json.dumps(job).encode() + b"\n")
            answer = b""
            while chunk := ours.recv(1 << 16):
                answer += chunk
        finally:
            isolation.stop(process)
    return json.loads(answer)


@pytest.mark.parametrize("sandbox", ["bubblewrap", "landlock"])
def test_each_call_made_from_within_does_what_the_list_says_and_harms_nothing(sandbox, tmp_path):
    if why := isolation.why_not(sandbox):
        pytest.skip(why)
    outside = tmp_path / "outside" / "file"
    outside.parent.mkdir()
    outside.write_text("as it was")
    folder = tmp_path / "work"
    folder.mkdir()
    caught = []
    before = _system_state(outside)
    old = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGIO, signal.SIGURG)}
    try:
        answers = _fuzz(sandbox, outside, folder)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    assert _system_state(outside) == before
    assert not caught
    table, names = reasons(), {number: name for name, number in NUMBERS.items()}
    assert len(answers) == END_OF_TABLE
    for number, results in answers.items():
        action = table[names[int(number)]][0] if int(number) in names else UNKNOWN
        for result in results:
            if int(number) in BY_THE_KERNEL:
                assert result in (["signal", signal.SIGILL], [errno.EPERM], [errno.ENXIO])
            elif action == REFUSE:
                assert result == ["errno", errno.EPERM], names[int(number)]
            elif action == UNKNOWN:
                assert result == ["errno", errno.ENOSYS], number
