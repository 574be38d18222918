"""Takes from a process, for good, all that arithmetic does not need: files, network, other processes, more memory.

By the kernel's seccomp filter: of its calls only those remain that use what is already open and mapped; every other one
fails with "not permitted". Linux on x86-64 and ARM64.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

from partway.errors import UsageError

_CALLS = {
    "x86_64": (
        0xC000003E,
        """
read:0 write:1 close:3 fstat:5 lseek:8 mmap:9 mprotect:10 munmap:11 brk:12 rt_sigaction:13 rt_sigprocmask:14
rt_sigreturn:15 readv:19 writev:20 sched_yield:24 mremap:25 madvise:28 nanosleep:35 getpid:39 exit:60 uname:63
gettimeofday:96 getrusage:98 sysinfo:99 times:100 getuid:102 sigaltstack:131 gettid:186 futex:202
sched_getaffinity:204 clock_gettime:228 clock_nanosleep:230 exit_group:231 tgkill:234 set_robust_list:273
getrandom:318 membarrier:324 rseq:334
        """,
    ),
    "aarch64": (
        0xC00000B7,
        """
close:57 lseek:62 read:63 write:64 readv:65 writev:66 fstat:80 exit:93 exit_group:94 futex:98 set_robust_list:99
nanosleep:101 clock_gettime:113 clock_nanosleep:115 sched_getaffinity:123 sched_yield:124 tgkill:131 sigaltstack:132
rt_sigaction:134 rt_sigprocmask:135 rt_sigreturn:139 times:153 uname:160 getrusage:165 gettimeofday:169 getpid:172
getuid:174 gettid:178 sysinfo:179 brk:214 munmap:215 mremap:216 mmap:222 mprotect:226 madvise:233 getrandom:278
membarrier:283 rseq:293
        """,
    ),
}
"""Of each kind of machine: the kernel's number of the kind, and of the calls that remain."""

_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER, _DIES_WITH_PARENT, _KILL = 38, 22, 2, 1, 9
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _NOT_PERMITTED = 0x7FFF0000, 0x00050000 | 1
NOBODY = 65534


def confine(memory: int) -> None:
    """Confines this process, and all its threads to come. There is no way back.

    Args:
        memory: bytes that it may take beyond those that it has.

    Raises:
        UsageError: the machine cannot do it; nothing may then be run here that must be confined.
    """
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        raise UsageError(f"segments of others run confined, which needs Linux on {' or '.join(_CALLS)}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DIES_WITH_PARENT, _KILL, 0, 0, 0)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    for limit, most in (
        (resource.RLIMIT_AS, now + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (most, most))
    kind, calls = _CALLS[platform.machine()]
    numbers = [int(call.partition(":")[2]) for call in calls.split()]
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, kind), (_RETURN, 0, 0, _NOT_PERMITTED), (_LOAD, 0, 0, 0)]
    for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
        steps.append((_EQUAL, left, 0, number))
    steps += [(_RETURN, 0, 0, _NOT_PERMITTED), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, program, 0, 0):
        raise UsageError(f"this kernel does not confine processes ({os.strerror(ctypes.get_errno())})")
