"""The system calls of Linux on x86-64: which ones a sandbox allows, with which arguments, and why it refuses others.

Data alone. Three profiles share it (see `rules`):

    supervisor   our own process around judged code: it loads libraries, starts a child, confines itself further
    function     judged code that may read any file
    program      judged code that may read the Python library alone, and may therefore lock files
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NAMES_FROM_0 = """
read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise
shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile socket connect accept
sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock
fsync fdatasync truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink symlink
readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo times ptrace getuid
syslog getgid setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups setgroups
setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid capget capset rt_sigpending
rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime mknod uselib personality ustat statfs fstatfs
sysfs getpriority setpriority sched_setparam sched_getparam sched_setscheduler sched_getscheduler
sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock mlockall munlockall vhangup
modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2
swapon swapoff reboot sethostname setdomainname iopl ioperm create_module init_module delete_module
get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead
setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
lremovexattr fremovexattr tkill time futex sched_setaffinity sched_getaffinity set_thread_area io_setup
io_destroy io_getevents io_submit io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old
epoll_wait_old remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create
timer_settime timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres
clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy get_mempolicy mq_open
mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl
ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat mknodat
fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll
unshare set_robust_list get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait
signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init
fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns getcpu
process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp getrandom
memfd_create kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2
pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq
"""
_NAMES_FROM_424 = """
pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig fsmount
fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2 mount_setattr
quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret process_mrelease
futex_waitv set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue
statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat
removexattrat open_tree_attr file_getattr file_setattr listns
"""
NUMBERS: Mapping[str, int] = {
    **{name: number for number, name in enumerate(_NAMES_FROM_0.split())},
    "uretprobe": 335,
    "uprobe": 336,
    **{name: number for number, name in enumerate(_NAMES_FROM_424.split(), start=424)},
}
END_OF_TABLE = 512  # numbers up to here that have no name are answered as a kernel does that does not know them

ALLOW, REFUSE, UNKNOWN = "allow", "refuse (EPERM)", "refuse (ENOSYS)"
# Stands for the process's own number, which only the process knows. No process has it: the kernel ends at 2^22.
OWN_PID = 0x7FFFFFFE
_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Condition:
    """(argument & mask) == value, in 64 bits; arguments count from 0."""

    argument: int
    value: int
    mask: int = _ALL_BITS


@dataclass(frozen=True)
class Rule:
    """What happens to a call where all conditions hold."""

    name: str
    action: str
    conditions: tuple[Condition, ...] = ()


_ALLOWED = {
    "reading and writing what is open": (
        "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range dup "
        "dup2 dup3 fstat fsync fdatasync ftruncate sendfile copy_file_range fadvise64 getdents getdents64"
    ),
    "files by name, where Landlock or the mounts let it": (
        "open openat creat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd "
        "chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 symlink symlinkat statfs "
        "fstatfs umask getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr"
    ),
    "its own memory": "brk munmap mprotect mremap madvise msync membarrier get_mempolicy",
    "threads": (
        "exit exit_group futex futex_waitv set_robust_list set_tid_address rseq gettid sched_yield "
        "sched_getaffinity arch_prctl restart_syscall"
    ),
    "its own signals and timers": (
        "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack alarm "
        "pause getitimer setitimer nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time "
        "timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4"
    ),
    "waiting for what is open": (
        "poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 pipe "
        "pipe2 eventfd eventfd2"
    ),
    "both ends of its own socket pair": "sendto recvfrom shutdown getsockname getpeername getsockopt",
    "questions about itself and the machine": (
        "getpid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid capget "
        "getrlimit getrusage times sysinfo uname getcpu getrandom getpriority ioprio_get sched_getparam "
        "sched_getscheduler sched_getattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval "
        "wait4 waitid"
    ),
}

# fcntl.h, asm/ioctls.h, sched.h, sys/mman.h, linux/prctl.h
_O_ASYNC = 0o20000
_FCNTL_COMMANDS = {"F_DUPFD": 0, "F_GETFD": 1, "F_SETFD": 2, "F_GETFL": 3, "F_DUPFD_CLOEXEC": 1030}
_FCNTL_SETFL = 4
_LOCK_COMMANDS = {"F_GETLK": 5, "F_SETLK": 6, "F_SETLKW": 7}
_IOCTL_COMMANDS = {
    "TCGETS": 0x5401, "TIOCGWINSZ": 0x5413, "FIONREAD": 0x541B, "FIONBIO": 0x5421, "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451, "TCGETS2": 0x802C542A,
}  # fmt: skip
_PRCTL_OPTIONS = {"PR_SET_NAME": 15, "PR_GET_NAME": 16}
_CLONE_VM, _CLONE_SIGHAND, _CLONE_THREAD = 0x100, 0x800, 0x10000
# CLONE_FS, FILES, DETACHED, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID, CHILD_SETTID
_CLONE_FREE = 0x200 | 0x400 | 0x400000 | 0x40000 | 0x80000 | 0x100000 | 0x200000 | 0x1000000
_MAP_LOCKED, _MAP_HUGETLB = 0x2000, 0x40000
_AF_UNIX, _SOCK_STREAM, _SOCK_FLAGS = 1, 1, 0o4000 | 0o2000000


def _one_of(argument: int, values: Iterable[int]) -> tuple[tuple[Condition, ...], ...]:
    return tuple((Condition(argument, value),) for value in values)


# Calls that are allowed where one of these lists of conditions holds, and why not otherwise.
_CONDITIONAL: Mapping[str, tuple[tuple[tuple[Condition, ...], ...], str]] = {
    "fcntl": (
        (*_one_of(1, _FCNTL_COMMANDS.values()), (Condition(1, _FCNTL_SETFL), Condition(2, 0, _O_ASYNC))),
        "owners and signals of a descriptor reach other processes; leases, seals, locks and pipe sizes bind others",
    ),
    "ioctl": (_one_of(1, _IOCTL_COMMANDS.values()), "owners of a descriptor, typing into a terminal, devices"),
    "prctl": (_one_of(0, _PRCTL_OPTIONS.values()), "the signal at the parent's death, dumps, tracing, speculation"),
    "clone": (
        ((Condition(0, _CLONE_VM | _CLONE_SIGHAND | _CLONE_THREAD, _ALL_BITS ^ _CLONE_FREE),),),
        "a second process, or one in new namespaces; threads are allowed",
    ),
    "mmap": (((Condition(3, 0, _MAP_LOCKED | _MAP_HUGETLB),),), "memory that cannot be taken back"),
    "socketpair": (
        ((Condition(0, _AF_UNIX), Condition(1, _SOCK_STREAM, _ALL_BITS ^ _SOCK_FLAGS)),),
        "sockets that can be connected anew, or whose kind is not needed",
    ),
    "kill": (((Condition(0, OWN_PID),),), "signals to other processes"),
    "tgkill": (((Condition(0, OWN_PID),),), "signals to other processes"),
    "prlimit64": (((Condition(0, 0), Condition(2, 0)),), "limits are read, not set; those of others are not read"),
}

_REFUSED = {
    "a second process, and another program in this one": "fork vfork execve execveat",
    "signals to other processes": "tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal",
    "other processes: their memory, descriptors, limits and order": (
        "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_open pidfd_getfd "
        "get_robust_list setpriority ioprio_set sched_setparam sched_setscheduler sched_setattr sched_setaffinity "
        "migrate_pages move_pages mbind set_mempolicy set_mempolicy_home_node setpgid setsid setrlimit"
    ),
    "IPC that outlives the process, is not counted as its memory, and is shared with others": (
        "shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink "
        "mq_timedsend mq_timedreceive mq_notify mq_getsetattr add_key request_key keyctl"
    ),
    "memory that is not counted, or cannot be taken back": (
        "memfd_create memfd_secret mlock mlock2 mlockall munlock munlockall remap_file_pages userfaultfd mincore "
        "cachestat pkey_mprotect pkey_alloc pkey_free modify_ldt set_thread_area get_thread_area mseal"
    ),
    "the network, and sockets with a name": (
        "socket connect accept accept4 bind listen setsockopt sendmsg recvmsg sendmmsg recvmmsg"
    ),
    "files' owners, modes, times and attributes, which Landlock does not know": (
        "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat setxattr lsetxattr fsetxattr setxattrat "
        "getxattrat listxattrat removexattr lremovexattr fremovexattr removexattrat utime utimes futimesat "
        "utimensat truncate file_getattr file_setattr"
    ),
    "files by other ways than their names, special files, second names": (
        "link linkat mknod mknodat name_to_handle_at open_by_handle_at fallocate splice tee vmsplice sync syncfs "
        "sync_file_range readahead"
    ),
    "locks that hold up others": "flock",
    "watching what others do with files": (
        "inotify_init inotify_init1 inotify_add_watch inotify_rm_watch fanotify_init fanotify_mark"
    ),
    "calls that a filter cannot see": (
        "io_uring_setup io_uring_enter io_uring_register io_setup io_destroy io_getevents io_submit io_cancel "
        "io_pgetevents"
    ),
    "timers and clocks beyond its own": (
        "timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime clock_adjtime "
        "adjtimex settimeofday"
    ),
    "mounts and namespaces": (
        "mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsconfig fsmount fspick "
        "mount_setattr open_tree_attr statmount listmount listns quotactl quotactl_fd sysfs ustat"
    ),
    "other rights": (
        "setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset personality "
        "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self lsm_get_self_attr "
        "lsm_set_self_attr lsm_list_modules"
    ),
    "the machine": (
        "reboot kexec_load kexec_file_load init_module finit_module delete_module create_module get_kernel_syms "
        "query_module swapon swapoff sethostname setdomainname iopl ioperm acct syslog vhangup nfsservctl bpf "
        "perf_event_open lookup_dcookie uprobe uretprobe uselib _sysctl getpmsg putpmsg afs_syscall tuxcall "
        "security vserver epoll_ctl_old epoll_wait_old"
    ),
}

# The C library has another way where the kernel does not know these. clone3 hides its flags from a filter.
_UNKNOWN = {
    "the C library falls back to an older call": (
        "clone3 openat2 futex_wait futex_wake futex_requeue map_shadow_stack"
    ),
}

# What the process around judged code needs beside: children, their limits and signals, and its own confinement.
_SUPERVISOR = (
    "fcntl ioctl prctl clone mmap kill tgkill prlimit64 fork vfork execve seccomp landlock_create_ruleset "
    "landlock_add_rule landlock_restrict_self capset setrlimit setsid setpgid flock sched_setaffinity pidfd_open "
    "chmod fchmod fchmodat fchmodat2"
)
_SUPERVISOR_NAMES = frozenset(_SUPERVISOR.split())


def _names(groups: Mapping[str, str]) -> list[str]:
    return [name for names in groups.values() for name in names.split()]


def reasons() -> dict[str, tuple[str, str]]:
    """(action, reason) of each call by name, for judged code; "allow some" where the arguments decide."""
    table = {name: ("allow some", reason) for name, (_, reason) in _CONDITIONAL.items()}
    for action, groups in ((ALLOW, _ALLOWED), (REFUSE, _REFUSED), (UNKNOWN, _UNKNOWN)):
        table |= {name: (action, reason) for reason, names in groups.items() for name in names.split()}
    return table


def rules(profile: str) -> list[Rule]:
    """For each name in the table one rule or more, no two of which hold for one call; where none holds, refuse."""
    supervisor = profile == "supervisor"
    listed = [Rule(name, ALLOW) for name in _names(_ALLOWED)]
    for name, (alternatives, _) in _CONDITIONAL.items():
        if supervisor and name in _SUPERVISOR_NAMES:
            listed.append(Rule(name, ALLOW))
        else:
            listed += [Rule(name, ALLOW, conditions) for conditions in alternatives]
    if profile == "program":
        listed += [Rule("fcntl", ALLOW, conditions) for conditions in _one_of(1, _LOCK_COMMANDS.values())]
    for action, groups in ((REFUSE, _REFUSED), (UNKNOWN, _UNKNOWN)):
        for name in _names(groups):
            if name == "flock" and profile == "program":
                listed.append(Rule(name, ALLOW))
            else:
                listed.append(Rule(name, ALLOW if supervisor and name in _SUPERVISOR_NAMES else action))
    return listed
