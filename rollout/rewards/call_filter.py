"""A seccomp filter for the kernel from the rules of `system_calls`: by libseccomp where there is one, else by us."""

from __future__ import annotations

import errno
import functools
import struct
import tempfile
from collections.abc import Sequence
from itertools import groupby

from lockstep.rollout.rewards.system_calls import ALLOW, END_OF_TABLE, NUMBERS, REFUSE, UNKNOWN, Rule, rules

try:
    import pyseccomp
except (ImportError, RuntimeError, OSError, AttributeError):  # no libseccomp for it to bind, a broken or an old one
    pyseccomp = None

# linux/seccomp.h, linux/bpf_common.h, linux/audit.h
_RETURNS = {ALLOW: 0x7FFF0000, REFUSE: 0x00050000 | errno.EPERM, UNKNOWN: 0x00050000 | errno.ENOSYS}
_KILL_PROCESS = 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X86_64, _X32_CALLS = 0xC000003E, 0x40000000
_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value; jumps count from the next one


def has_libseccomp() -> bool:
    return pyseccomp is not None


@functools.cache
def filter_of(profile: str) -> bytes:
    """The filter's instructions, 8 bytes each, for seccomp(2) and for bubblewrap. See `system_calls` for profiles."""
    return by_libseccomp(rules(profile)) if has_libseccomp() else by_hand(rules(profile))


def by_libseccomp(listed: Sequence[Rule]) -> bytes:
    """Calls of the 32-bit and of the x32 interface end the process."""
    made = pyseccomp.SyscallFilter(_RETURNS[REFUSE])
    made.set_attr(pyseccomp.Attr.ACT_BADARCH, _KILL_PROCESS)
    for rule in _complete(listed):
        arguments = [pyseccomp.Arg(c.argument, pyseccomp.MASKED_EQ, c.mask, c.value) for c in rule.conditions]
        made.add_rule(_RETURNS[rule.action], _number(rule), *arguments)
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        return file.read()


def by_hand(listed: Sequence[Rule]) -> bytes:
    """One call after the other, in the order of their numbers."""
    kill = (_RETURN, 0, 0, _KILL_PROCESS)
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _X86_64), kill,
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32_CALLS), kill,
    ]  # fmt: skip
    for number, same in groupby(sorted(_complete(listed), key=_number), key=_number):
        block = [instruction for rule in same for instruction in _tested(rule)]
        block.append((_RETURN, 0, 0, _RETURNS[REFUSE]))
        program += [(_EQUAL, 0, len(block), number), *block]
    program.append((_RETURN, 0, 0, _RETURNS[REFUSE]))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _tested(rule: Rule) -> list[_Instruction]:
    """The rule's return behind its conditions; where one does not hold, on behind that return."""
    made: list[_Instruction] = [(_RETURN, 0, 0, _RETURNS[rule.action])]
    for condition in reversed(rule.conditions):
        for half in (1, 0):  # in 32 bits each; x86-64 has the low ones first
            mask, value = ((number >> 32 * half) & 0xFFFFFFFF for number in (condition.mask, condition.value))
            load = (_LOAD, 0, 0, _ARGUMENTS + 8 * condition.argument + 4 * half)
            if mask:
                made = [load, (_AND, 0, 0, mask), (_EQUAL, 0, len(made), value), *made]
    return made


def _complete(listed: Sequence[Rule]) -> list[Rule]:
    """Without those that do what happens anyway, and with the numbers that have no name."""
    known = set(NUMBERS.values())
    unknown = [Rule(str(number), UNKNOWN) for number in range(END_OF_TABLE) if number not in known]
    return [rule for rule in listed if rule.action != REFUSE] + unknown


def _number(rule: Rule) -> int:
    return NUMBERS[rule.name] if rule.name in NUMBERS else int(rule.name)
