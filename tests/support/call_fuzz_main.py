"""Makes every system call from within a confined child, with hostile arguments; see test_system_calls.

Started by `isolation.start`. Answers {number: [what happened, for each list of arguments]}.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
F_SETOWN, SIGKILL, AT_FDCWD = 8, 9, -100


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    with channel.makefile("rb") as file:
        job = json.loads(file.readline())
    sys.path[:0] = job["path"]
    import isolated_main

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    kinds = range(len(_hostile(job, 0, 0)))
    answer = {}
    for number in job["together"]:  # these return at once, each time
        answer[number] = [None for _ in kinds]
    pairs = [(number, kind) for number in job["together"] for kind in kinds]
    results = _in_child(isolated_main, libc, job, pairs, 60.0)
    for (number, kind), result in zip(pairs, results, strict=False):
        answer[number][kind] = ["errno", result]
    for number in job["alone"]:
        seconds = 0.1 if number in job["may_wait"] else 20.0
        answer[number] = [_in_child(isolated_main, libc, job, [(number, kind)], seconds) for kind in kinds]
    channel.sendall(json.dumps(answer).encode())


def _in_child(isolated_main, libc, job, pairs, seconds):
    """The error numbers of calls that return; else ["signal", number] or ["time", 0]."""
    parent = os.getpid()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _make_calls(isolated_main, libc, {**job["confinement"], "parent": parent}, job, pairs, writer)
    os.close(writer)
    deadline = time.monotonic() + seconds
    with os.fdopen(reader, "rb") as file:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return list(file.read()) if code >= 0 else ["signal", -code]
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return ["time", 0]


def _make_calls(isolated_main, libc, confinement, job, pairs, writer):
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        os.dup2(writer, 60)
        os.closerange(3, 60)
        os.pipe()  # 3 and 4
        path = ctypes.create_string_buffer(job["outside"].encode())
        arguments = _hostile(job, ctypes.addressof(path), os.getpid())
        isolated_main.confine(confinement)
        results = bytearray()
        for number, kind in pairs:
            ctypes.set_errno(0)
            result = libc.syscall(*(ctypes.c_long(value) for value in (number, *arguments[kind])))
            results.append(ctypes.get_errno() & 0xFF if result == -1 else 0)
        os.write(60, results)
    finally:
        os._exit(0)


def _hostile(job, path: int, own: int):
    """Lists of arguments: nothing, all ones, a foreign process and a signal, owners, a foreign file in two places."""
    parent, reader = job["parent"], 3
    return [
        (0, 0, 0, 0, 0, 0),
        (-1, -1, -1, -1, -1, -1),
        (parent, SIGKILL, SIGKILL, path, 1, 0),
        (parent, parent, SIGKILL, path, 1, 0),
        (reader, F_SETOWN, parent, 0, 0, 0),
        (path, 0o777, 0o777, 0o777, 0, 0),
        (AT_FDCWD, path, 0o1001, 0o777, 0, 0),
        (path, path, path, path, 1, 0),
        (own, own, 0, path, 1, 0),
    ]


if __name__ == "__main__":
    main()
