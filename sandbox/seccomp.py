"""Which system calls a sealed session may make: a seccomp filter, without a library.

A kernel computes, and reads and writes what it has open. It starts no program, opens no socket, looks at no
other process and changes nothing about the machine, so the calls for that fail with EPERM. Starting a
process is put to the supervisor at the other end of the filter, which says yes to `Session.fork` only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import itertools
import os
import platform
import select
import signal
import struct
import sys
from dataclasses import dataclass

from sandbox import syscalls

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # <linux/audit.h>
LAST_KNOWN = 452
"""Newer calls do not exist for a session, so that none gets in that nobody has thought about."""

DENIED = """
    execve 59 221  execveat 322 281  setsid 112 157
    socket 41 198  connect 42 203  bind 49 200  listen 50 201  sendmmsg 307 269
    ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  process_madvise 440 440
    process_mrelease 448 448  kcmp 312 272  pidfd_open 434 434  pidfd_getfd 438 438  pidfd_send_signal 424 424
    tkill 200 130  get_robust_list 274 100  migrate_pages 256 238  move_pages 279 239
    unshare 272 97  setns 308 268  mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51
    move_mount 429 429  fsopen 430 430  fsconfig 431 431  fsmount 432 432  fspick 433 433  open_tree 428 428
    mount_setattr 442 442  name_to_handle_at 303 264  open_by_handle_at 304 265  fanotify_init 300 262
    quotactl 179 60  quotactl_fd 443 443  swapon 167 224  swapoff 168 225
    setuid 105 146  setgid 106 144  setreuid 113 145  setregid 114 143  setresuid 117 147  setresgid 119 149
    setfsuid 122 151  setfsgid 123 152  setgroups 116 159  capset 126 91
    shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193  semtimedop 220 192  semctl 66 191
    msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187  mq_open 240 180  mq_unlink 241 181
    memfd_create 319 279  memfd_secret 447 447
    seccomp 317 277  bpf 321 280  perf_event_open 298 241  userfaultfd 323 282  io_uring_setup 425 425
    io_uring_enter 426 426  io_uring_register 427 427  keyctl 250 219  add_key 248 217  request_key 249 218
    kexec_load 246 104  kexec_file_load 320 294  init_module 175 105  finit_module 313 273  delete_module 176 106
    reboot 169 142  syslog 103 116  acct 163 89  sethostname 170 161  setdomainname 171 162
    settimeofday 164 170  clock_settime 227 112  adjtimex 159 171  clock_adjtime 305 266  personality 135 92
    lookup_dcookie 212 18  nfsservctl 180 42  vhangup 153 58  iopl 172 -  ioperm 173 -  modify_ldt 154 -
    uselib 134 -  ustat 136 -  sysfs 139 -  _sysctl 156 -  set_mempolicy 238 237  mbind 237 235
    set_mempolicy_home_node 450 450  ioprio_set 251 30  sched_setparam 142 118
    sched_setattr 314 274  inotify_init 253 -  inotify_init1 294 26  io_setup 206 0  sync 162 81  syncfs 306 267
"""
CONDITIONAL = """
    fork 57 -  vfork 58 -  clone 56 220  clone3 435 435  setpgid 109 154  kill 62 129  tgkill 234 131
    rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240  prctl 157 167  prlimit64 302 261  socketpair 53 199
    sendto 44 206  setpriority 141 140  sched_setaffinity 203 122
    sched_setscheduler 144 119
"""
"""Names with their numbers on x86_64 and aarch64 (<asm/unistd_64.h>, <asm-generic/unistd.h>)."""

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06  # <linux/bpf_common.h>
NUMBER_AT, ARCH_AT, ARGS_AT = 0, 4, 16  # offsets in struct seccomp_data
X32_BIT = 0x40000000
ALLOW, NOTIFY, ERRNO = 0x7FFF0000, 0x7FC00000, 0x00050000  # <linux/seccomp.h>
DENY, UNKNOWN = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
SET_MODE_FILTER = 1
FLAG_TSYNC, FLAG_NEW_LISTENER, FLAG_TSYNC_ESRCH = 1, 8, 16
NOTIF_RECV, NOTIF_SEND, NOTIF_CONTINUE = 0xC0502100, 0xC0182101, 1
NOTIFICATION_BYTES = 80

ANY_PROCESS = 2**31 - 1
"""In a program that is not yet loaded: the id of the process that will load it. No process has this one."""
CLONE_THREAD = 0x00010000
AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK = 1, 1, 0xF
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41


def _numbers(table: str) -> dict[str, int]:
    words = iter(table.split())
    column = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
    if column is None:
        raise OSError(f"no table of system calls for {platform.machine()}")
    entries = {name: pair[column] for name, *pair in zip(words, words, words, strict=True)}
    return {name: int(number) for name, number in entries.items() if number != "-"}


@dataclass(frozen=True, slots=True)
class Is:
    """A test of the low 32 bits of an argument."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF
    is_high: bool = False
    """Test the high 32 bits instead."""


def install(*, max_processes: int) -> int | None:
    """Filter the system calls of every thread of this process, for good.

    Args:
        max_processes: if not 0, programs and processes may be started, and rlimits count them.

    Returns:
        The descriptor of the supervisor's end, for `supervise`; None if the kernel has none to give, and then
        no process is ever started.

    Raises:
        OSError: the kernel refused, or the machine's system calls are not known here.
    """
    threads = FLAG_TSYNC | FLAG_TSYNC_ESRCH
    try:
        return _load(program(max_processes, NOTIFY), threads | FLAG_NEW_LISTENER)
    except OSError:  # before Linux 5.7, or another filter above this one has a listener
        _load(program(max_processes, DENY), FLAG_TSYNC)
        return None


def supervise(listener: int, num_allowed: int) -> int:
    """Answer one call that was put to the supervisor.

    Args:
        num_allowed: how many calls may still go ahead.

    Returns:
        How many may after this one.
    """
    ready = select.poll()
    ready.register(listener, select.POLLIN)
    if not any(events & select.POLLIN for _, events in ready.poll(0)):
        return num_allowed  # all callers have ended, and to wait for another would be to wait for ever
    notification = bytearray(NOTIFICATION_BYTES)
    try:
        fcntl.ioctl(listener, NOTIF_RECV, notification)
        [cookie] = struct.unpack_from("Q", notification)
        is_allowed = num_allowed > 0
        error, flags = (0, NOTIF_CONTINUE) if is_allowed else (-errno.EPERM, 0)
        fcntl.ioctl(listener, NOTIF_SEND, struct.pack("QqiI", cookie, 0, error, flags))
    except OSError:  # the caller was killed meanwhile
        return num_allowed
    return num_allowed - is_allowed


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _load(program: bytes, flags: int) -> int:
    program = program.replace(ANY_PROCESS.to_bytes(4, sys.byteorder), os.getpid().to_bytes(4, sys.byteorder))
    return syscalls.call("seccomp", SET_MODE_FILTER, flags, _Program(len(program) // 8, program))


@functools.cache
def program(max_processes: int, on_process: int = NOTIFY) -> bytes:
    """The filter for any process, in which `ANY_PROCESS` stands for its id.

    Raises:
        OSError: the machine's system calls are not known here.
    """
    machine = platform.machine()
    denied, conditional = _numbers(DENIED), _numbers(CONDITIONAL)
    if max_processes:
        del denied["execve"], denied["execveat"]
    code = [
        _instruction(LOAD, ARCH_AT),
        *_jump(JUMP_EQUAL, AUDIT_ARCH[machine], over=[_instruction(RETURN, DENY)], when=True),
        _instruction(LOAD, NUMBER_AT),
    ]
    if machine == "x86_64":
        code += _jump(JUMP_GREATER_EQUAL, X32_BIT, over=[_instruction(RETURN, DENY)])
    code += _jump(JUMP_GREATER_EQUAL, LAST_KNOWN + 1, over=[_instruction(RETURN, UNKNOWN)])
    for number in denied.values():
        code += _jump(JUMP_EQUAL, number, over=[_instruction(RETURN, DENY)])
    for name, otherwise, *exceptions in _conditions(ALLOW if max_processes else on_process, on_process):
        if name in conditional:
            answer = [*itertools.chain(*map(_allow_if, exceptions)), _instruction(RETURN, otherwise)]
            code += _jump(JUMP_EQUAL, conditional[name], over=answer)
    return b"".join([*code, _instruction(RETURN, ALLOW)])


def _conditions(on_process: int, on_group: int) -> list[tuple]:
    """Calls whose arguments matter: name, the answer, and the cases in which they are allowed all the same."""
    itself = [Is(0, ANY_PROCESS)]
    return [
        ("clone3", UNKNOWN),  # its flags are out of a filter's reach; libc falls back to clone
        ("clone", on_process, [Is(0, CLONE_THREAD, mask=CLONE_THREAD)]),
        ("fork", on_process),
        ("vfork", on_process),
        ("setpgid", on_group),
        ("kill", DENY, itself),
        ("tgkill", DENY, itself),
        ("rt_sigqueueinfo", DENY, itself),
        ("rt_tgsigqueueinfo", DENY, itself),
        ("prlimit64", DENY, [Is(0, 0)]),
        ("sched_setaffinity", DENY, [Is(0, 0)]),
        ("setpriority", DENY, [Is(0, 0), Is(1, 0)]),
        ("sched_setscheduler", DENY, [Is(1, os.SCHED_OTHER)]),  # as each of zmq's threads does
        ("socketpair", DENY, [Is(0, AF_UNIX), Is(1, SOCK_STREAM, mask=SOCK_TYPE_MASK)]),
        ("sendto", DENY, [Is(4, 0), Is(4, 0, is_high=True)]),  # no address: along a connection only
        (
            "prctl",
            DENY,
            [Is(0, syscalls.PR_SET_PDEATHSIG), Is(1, signal.SIGKILL)],
            *([Is(0, option)] for option in (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)),
        ),
    ]


def _allow_if(tests: list[Is]) -> list[bytes]:
    code = [_instruction(RETURN, ALLOW)]
    for test in reversed(tests):
        load = [_instruction(LOAD, ARGS_AT + 8 * test.argument + 4 * test.is_high)]
        if test.mask != 0xFFFFFFFF:
            load.append(_instruction(AND, test.mask))
        code = [*load, *_jump(JUMP_EQUAL, test.value, over=code)]
    return code


def _jump(test: int, value: int, over: list[bytes], *, when: bool = False) -> list[bytes]:
    """Skip `over` when the test comes out as `when`."""
    return [_instruction(test, value, len(over) * when, len(over) * (not when)), *over]


def _instruction(kind: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("HBBI", kind, if_so, if_not, value)
