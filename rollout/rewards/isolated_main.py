"""Runs untrusted or unreliable Python in this process, after giving up all that could harm or stall others.

Started by `isolation` as `python -I isolated_main.py job.json` in a directory of its own, with the standard library
alone. The kernel then enforces, until this process ends:

    Landlock     files are written in this directory only, and read where the job allows it
    seccomp      no second process (the kernel ends this one), no socket, no signal to others, no new modes or owners
    rlimits      CPU time, address space, size of a file, open files, core dumps
    no capability, no way to gain one, and an end with the parent
"""

import ctypes
import importlib
import importlib.util
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from types import SimpleNamespace

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT, _SECCOMP, _CAPSET = 444, 445, 446, 317, 126
_EPERM, _ENOSYS = 1, 38

# Rights of linux/landlock.h, in the order of their bits, and how many of them each version of its interface knows.
_READ = 0b1101  # execute, read a file, list a directory
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NUM_RIGHTS_LATER = 16

# x86-64's numbers. Of calls that reach other processes, or files without opening them.
_REFUSED = {
    "truncate": 76, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260,
    "fchmodat": 268, "fchmodat2": 452, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463,
    "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
    "socket": 41, "io_uring_setup": 425,
    "kill": 62, "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424,
    "pidfd_open": 434, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440,
    "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203,
    "sched_setattr": 314, "ioprio_set": 251, "migrate_pages": 256, "move_pages": 279,
    "shmctl": 31, "semctl": 66, "msgctl": 71, "unshare": 272,
}  # fmt: skip
_CLONE, _FORK, _VFORK, _CLONE3, _TGKILL, _PRLIMIT = 56, 57, 58, 435, 234, 302
_CLONE_THREAD = 0x10000
_X32_CALLS = 0x40000000
_AUDIT_ARCH_X86_64 = 0xC000003E

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARG0, _ARG2_LOW, _ARG2_HIGH = 0, 4, 16, 32, 36  # offsets in struct seccomp_data


def confine(job: dict) -> None:
    """Raises OSError that names what this kernel cannot enforce; nothing foreign has run then."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise OSError(f"isolation is written for Linux on x86-64, not {platform.system()} on {platform.machine()}")
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "a signal at the parent's death")
    if os.getppid() != job["parent"]:
        sys.exit("the parent has ended")
    for name, limit in job["rlimits"].items():
        # One second more before the end that cannot be caught: the first signal names the reason.
        resource.setrlimit(getattr(resource, name), (limit, limit + (name == "RLIMIT_CPU")))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(_CAPSET, header, none), "dropping capabilities")
    _restrict_files(os.getcwd(), job["readable"])
    _filter_calls()


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(f"this kernel does not give isolation {what}: {os.strerror(ctypes.get_errno())}")
    return result


def _restrict_files(directory: str, readable: list[str]) -> None:
    version = _check(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock (Linux 5.13 and later)")
    everything = (1 << _NUM_RIGHTS.get(version, _NUM_RIGHTS_LATER)) - 1
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, struct.pack("<Q", everything), 8, 0), "a Landlock ruleset")
    write_file = 0b10
    for path, rights in [(directory, everything), ("/dev/null", write_file | 0b100), *((p, _READ) for p in readable)]:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= 0b111
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", rights, descriptor)
        _check(_libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"a Landlock rule for {path}")
        os.close(descriptor)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def _filter_calls() -> None:
    """Each instruction is (code, jump if true, jump if false, value); jumps count instructions from the next one."""
    load_number = (_LOAD, 0, 0, _NUMBER)
    refuse, kill, allow = ((_RETURN, 0, 0, value) for value in (_ERRNO | _EPERM, _KILL, _ALLOW))
    program = [
        (_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64), kill,
        load_number, (_AT_LEAST, 0, 1, _X32_CALLS), kill,
        (_EQUAL, 0, 1, _FORK), kill, (_EQUAL, 0, 1, _VFORK), kill,
        # clone3 hides its flags from the filter; the C library then falls back to clone.
        (_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_EQUAL, 0, 4, _CLONE), (_LOAD, 0, 0, _ARG0), (_ANY_BIT, 1, 0, _CLONE_THREAD), kill, allow,
        (_EQUAL, 0, 4, _TGKILL), (_LOAD, 0, 0, _ARG0), (_EQUAL, 1, 0, os.getpid()), refuse, allow,
        # Limits may be read (no new one is given), of whatever process.
        (_EQUAL, 0, 6, _PRLIMIT), (_LOAD, 0, 0, _ARG2_LOW), (_EQUAL, 0, 3, 0), (_LOAD, 0, 0, _ARG2_HIGH),
        (_EQUAL, 0, 1, 0), allow, refuse,
    ]  # fmt: skip
    for number in _REFUSED.values():
        program += [(_EQUAL, 0, 1, number), refuse]
    program.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *instruction) for instruction in program))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    _check(_libc.syscall(_SECCOMP, 1, 0, header), "seccomp")


def run_program(job: dict) -> None:
    """The program as the main module; its output and its exit code are the job's."""
    exec(compile(job["program"], "program.py", "exec"), {"__name__": "__main__"})


def run_function(job: dict) -> None:
    """One line of JSON for each item, on what was the standard output: what the function itself prints is dropped."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    function = load_function(job["function"])
    for problem, response in job["items"]:
        results.write(json.dumps(float(function(SimpleNamespace(**problem), response))) + "\n")


def load_function(reference: str):
    """`path/to/file.py:name`, or the dotted path of a function. Raises ValueError that says what is wrong."""
    is_file = ".py:" in reference
    module_name, _, name = reference.rpartition(":" if is_file else ".")
    try:
        if is_file:
            spec = importlib.util.spec_from_file_location(os.path.basename(module_name)[:-3], module_name)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"cannot find the reward function {reference!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward {reference!r} is a {type(function).__name__}, not a function")
    return function


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    sys.path[:] = job["path"]
    try:
        confine(job)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(job["cannot_confine"])
    try:
        (run_program if "program" in job else run_function)(job)
    except Exception:
        # The standard error was closed to what the job prints, and is the parent's way to a reason.
        traceback.print_exc(limit=-1)
        sys.exit(1)


if __name__ == "__main__":
    main()
