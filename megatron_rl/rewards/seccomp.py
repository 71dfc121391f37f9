"""The system calls that the sandbox refuses, as a filter for `bwrap --seccomp`.

bubblewrap's namespaces and the limits of `cell.start` do the rest; this closes what they leave open: memory that belongs to no
process (memfd, System V), namespaces within the namespace (a user namespace brings back mount, and tmpfs without limit), other
processes' memory and files, and corners of the kernel that no program here needs.

Invariant: a refused call fails with EPERM (clone3 with ENOSYS, upon which libc takes clone); another calling convention kills.
"""

from __future__ import annotations

import platform
import struct

# Numbers of x86-64 and of aarch64 (the kernel's asm/unistd_64.h and asm-generic/unistd.h).
_REFUSED = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET (linux/sched.h)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_* (linux/audit.h)
_X32 = 0x40000000  # bit of x86-64's second set of numbers

# linux/bpf_common.h, linux/seccomp.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def program(machine: str | None = None) -> bytes:
    """An array of struct sock_filter for this machine. LookupError where its system calls are unknown."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise LookupError(f"no system call filter for {machine}")
    column, architecture = _ARCHITECTURES[machine]

    def unless(test: int, value: int, verdict: int) -> list[tuple[int, int, int, int]]:
        return [(test, 0, 1, value), (_RETURN, 0, 0, verdict)]

    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    steps += unless(_AT_LEAST, _X32, _KILL)
    for numbers in _REFUSED.values():
        steps += unless(_EQUAL, numbers[column], _EPERM)
    steps += unless(_EQUAL, _CLONE3[column], _ENOSYS)
    steps += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), *unless(_ANY_BIT, _NEW_NAMESPACE, _EPERM)]
    steps += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
