"""Runs untrusted or unreliable Python after giving up all that could harm or stall others.

Started by `isolation` as `python -I isolated_main.py MAIN DESCRIPTOR`, with the standard library alone. This process is
ours: it runs MAIN, reads its job from the descriptor, and answers there. What it judges runs in a child, which has no
descriptor but its standard ones and has been through `confine`. The kernel then enforces, until the child ends, within
bubblewrap or without it:

    Landlock     files are written in the child's directory only, and read where the job allows it
    seccomp      a list of allowed system calls; see system_calls.py
    rlimits      CPU time, address space, size of a file, open files, core dumps
    no capability, no way to gain one, and an end with the parent

`overuse` watches from outside what the kernel has no limit for; `remove_tree` removes what is left.
"""

import contextlib
import ctypes
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT, _SECCOMP, _CAPSET = 444, 445, 446, 317, 126

# Rights of linux/landlock.h, in the order of their bits, and how many of them each version of its interface knows.
_READ = 0b1101  # execute, read a file, list a directory
_WRITE_FILE, _READ_FILE = 0b10, 0b100
_MAKE_SPECIAL = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # character devices, sockets, pipes, block devices
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NUM_RIGHTS_LATER = 16
_TCP_FROM, _SCOPES_FROM = 4, 6
_BIND_AND_CONNECT, _ABSTRACT_SOCKETS_AND_SIGNALS = 0b11, 0b11
_WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")

_JUMP_IF_EQUAL = 0x15
_OWN_PID = 0x7FFFFFFE  # as in system_calls.py, which this file cannot import

_WATCH_EVERY_S = 0.1
_LONGEST_PATH = 2000  # bytes
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def confine(job: dict) -> None:
    """From here on, this process may run foreign code. Its working directory is where it may write.

    job: what `isolation.confinement` gives, and "parent": the process with which this one ends.
    Raises OSError that names what this kernel cannot enforce; nothing foreign has run then.
    """
    _end_with(job["parent"])
    for name, limit in job["rlimits"].items():
        # One second more before the end that cannot be caught: the first signal names the reason.
        resource.setrlimit(getattr(resource, name), (limit, limit + (name == "RLIMIT_CPU")))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(_CAPSET, header, none), "dropping capabilities")
    if job["needs_landlock"] or landlock_version():
        _restrict_files(os.getcwd(), job["readable"])
    _filter_calls(bytes.fromhex(job["filter"]))


def landlock_version() -> int:
    """Of this kernel's Landlock interface; 0 where it has none."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, 0, 1))


def overuse(child: int, directory: str, job: dict) -> str | None:
    """Why a child is to be stopped for its number of threads, or for what lies in its directory; None where it is not.

    job: what `isolation.confinement` gives. Cheap enough to ask some ten times a second.
    """
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{child}/stat", "rb") as file:
        num_threads = int(file.read().rpartition(b")")[2].split()[17])
        if num_threads > job["num_threads"]:
            return f"threads: more than {job['num_threads']}"
    if job["is_tmpfs"]:  # its mount limits the bytes
        usage = os.statvfs(directory)
        return f"files: more than {job['num_files']}" if usage.f_files - usage.f_ffree > job["num_files"] else None
    return _too_much_in(directory, job["num_files"], job["disk_bytes"])


def _too_much_in(directory: str, num_files: int, disk_bytes: int) -> str | None:
    pending, files, size = [directory], 0, 0
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                files += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                if files > num_files:
                    return f"files: more than {num_files}"
                if size > disk_bytes:
                    return f"disk: more than {disk_bytes} bytes"
                if len(os.fsencode(entry.path)) > _LONGEST_PATH:
                    return "files: nested too deeply"
    return None


def _end_with(parent: int) -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "a signal at the parent's death")
    if os.getppid() != parent:
        os._exit(1)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(f"this kernel does not give isolation {what}: {os.strerror(ctypes.get_errno())}")
    return result


def _restrict_files(directory: str, readable: list) -> None:
    version = _check(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock (Linux 5.13 and later)")
    everything = (1 << _NUM_RIGHTS.get(version, _NUM_RIGHTS_LATER)) - 1
    attributes = struct.pack("<Q", everything)
    attributes += struct.pack("<Q", _BIND_AND_CONNECT) if version >= _TCP_FROM else b""
    attributes += struct.pack("<Q", _ABSTRACT_SOCKETS_AND_SIGNALS) if version >= _SCOPES_FROM else b""
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0), "a Landlock ruleset")
    writable = [(path, _WRITE_FILE | _READ_FILE) for path in _WRITABLE_DEVICES]
    for path, rights in [(directory, everything & ~_MAKE_SPECIAL), *writable, *((p, _READ) for p in readable)]:
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


def _filter_calls(program: bytes) -> None:
    """Each instruction is (code, jump if true, jump if false, value)."""
    instructions = [
        (code, yes, no, os.getpid() if code == _JUMP_IF_EQUAL and value == _OWN_PID else value)
        for code, yes, no, value in struct.iter_unpack("<HBBI", program)
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in instructions))
    header = struct.pack("<HxxxxxxQ", len(instructions), ctypes.addressof(code))
    _check(_libc.syscall(_SECCOMP, 1, 0, header), "seccomp")


def run_program(channel: int) -> None:
    """A job's program in a child. Answers {"error"} where it cannot be confined, else {"code", "stopped"}.

    Where the job has tests, they run in a second child, whose end is the program's: its code is answered.
    code: as subprocess counts exit codes; stopped: why this process has stopped a child, or null.
    """
    with os.fdopen(os.dup(channel), "rb") as file:
        job = json.load(file)
    deadline = time.monotonic() + job["wall_time_s"]
    roles = [(_run_source, job["program"], None)]
    if job["tests"] is not None:
        remote = runpy.run_path(os.path.join(os.path.dirname(__file__), "remote_tests.py"))
        ends = socket.socketpair()
        roles = [
            (remote["serve_program"], job["program"], ends[0]),
            (remote["run_tests"], job["tests"], ends[1]),
        ]
    children, error = [], ""
    while len(children) < len(roles) and not error:
        child, error = _confined_child(job, *roles[len(children)])
        if child == 0:
            return  # to Python's own end, which waits for threads and flushes
        children.append(child)
    for _, _, end in roles:
        if end is not None:
            end.close()
    stopped = None if error else _watch(children, job, deadline)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in reversed(children)]
    answer = {"error": error} if error else {"code": codes[0], "stopped": stopped}
    os.write(channel, json.dumps(answer).encode())


def _confined_child(job: dict, run, source: str, end) -> tuple:
    """(process id, why it could not be confined); in the child, where `run` has ended, (0, "")."""
    confined, ready = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _be_confined({**job, "parent": parent}, [ready] + ([] if end is None else [end.fileno()]))
        sys.argv[:] = ["program.py"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            run(source, *(() if end is None else (4,)))
        except Exception:
            # The standard error was closed to what the job prints, and is the parent's way to a reason.
            traceback.print_exc(limit=-1)
            sys.exit(1)
        return 0, ""
    os.close(ready)
    with os.fdopen(confined, "rb") as file:
        return child, file.read().decode()


def _run_source(source: str) -> None:
    exec(compile(source, "program.py", "exec"), sys.modules["__main__"].__dict__)


def _watch(children: list, job: dict, deadline: float) -> str | None:
    """Until the last child ends or one is stopped; why it is stopped. The others end with it."""
    ended = select.poll()
    ended.register(os.pidfd_open(children[-1]), select.POLLIN)
    stopped = None
    while stopped is None:
        left = deadline - time.monotonic()
        if ended.poll(max(0.0, min(left, _WATCH_EVERY_S)) * 1e3):
            break
        if left <= 0:
            stopped = f"wall time: more than {job['wall_time_s']} s"
        for child in children:
            stopped = stopped or overuse(child, os.getcwd(), job)
    for child in children if stopped else children[:-1]:
        os.kill(child, signal.SIGKILL)
    return stopped


def _be_confined(job: dict, kept: list) -> None:
    """Keeps the first of `kept`, as descriptor 3, until it is confined; it gets the reason where that fails."""
    for number, descriptor in enumerate(kept):
        os.dup2(descriptor, 200 + number)
    for number in range(len(kept)):
        os.dup2(200 + number, 3 + number, inheritable=False)
    os.closerange(3 + len(kept), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    sys.path[:] = job["path"]
    try:
        confine(job)
    except OSError as error:
        os.write(3, str(error).encode())
        os._exit(1)
    os.close(3)


def remove_tree(directory) -> None:
    """However deep it is and whatever its modes are: nothing recurses, and no path is longer than one name.

    Nothing may still move what lies within. Raises OSError for what cannot be removed.
    """
    opened = os.open(directory, _DIRECTORY)
    levels = [("", _emptied(opened))]
    while levels:
        name, inner = levels[-1]
        if inner:
            below = inner.pop()
            os.chmod(below, 0o700, dir_fd=opened)
            opened = _moved(opened, below)
            levels.append((below, _emptied(opened)))
        else:
            levels.pop()
            if levels:
                opened = _moved(opened, "..")
                os.rmdir(name, dir_fd=opened)
    os.close(opened)
    os.rmdir(directory)


def _emptied(opened: int) -> list:
    """Removes a directory's files; the names of the directories in it."""
    with os.scandir(opened) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        if not is_directory:
            os.unlink(name, dir_fd=opened)
    return [name for name, is_directory in found if is_directory]


def _moved(opened: int, name: str) -> int:
    """Another open directory in place of this one."""
    other = os.open(name, _DIRECTORY, dir_fd=opened)
    os.close(opened)
    return other


def main() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "a signal at the parent's death")
    # No process of the same user may look into this one's memory, or a child answer for another one.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "memory that others cannot read")
    path, descriptor = sys.argv[1:]
    if path == __file__:
        run_program(int(descriptor))
    else:
        sys.argv[:] = [path, descriptor]
        runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
