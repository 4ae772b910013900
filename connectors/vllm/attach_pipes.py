"""The pipes by which the scheduler's process announces L1 to its workers, and their messages.

vLLM's handshake goes from the workers to the scheduler's process, which then opens L1. The next
message back is the first step. So that workers attach and pin L1 before the first request, each
worker makes two pipes and describes them in its `Shard`; the scheduler's process opens them by
their paths, as a worker opens the slab. The kernel permits that to processes of the same user.

Every message is one JSON line.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvcache.slab import SlabDescriptor


@dataclass(frozen=True, slots=True)
class PipeEnd:
    """An end of a pipe that a process of this host has open. Picklable; keeps no file open.

    Attributes:
        path: ``/proc/<pid>/fd/<n>``.
        name: ``pipe:[<inode>]``. Once the process has ended, the path may lead to another file.
    """

    path: str
    name: str

    @classmethod
    def of(cls, fd: int) -> PipeEnd:
        """Return the end that this process has open as ``fd``."""
        path = Path(f"/proc/{os.getpid()}/fd/{fd}")
        return cls(str(path), str(path.readlink()))

    def open(self, mode: int) -> int:
        """Open it as ``mode``, O_RDONLY or O_WRONLY. Reads and writes of the result do not block.

        Raises:
            OSError: if its process has ended, or is one of another user or pid namespace.
        """
        fd = os.open(self.path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
        if (found := str(Path(f"/proc/self/fd/{fd}").readlink())) != self.name:
            os.close(fd)
            raise FileNotFoundError(f"the worker's pipe {self.path} is now {found}")
        return fd


@dataclass(frozen=True, slots=True)
class AttachPipes:
    """The pipes of one worker.

    Attributes:
        announcement: in which the scheduler's process writes one `Announcement`.
        progress: in which the worker writes `AttachProgress`. It closes the pipe when it has
            attached all of L1.
    """

    announcement: PipeEnd
    progress: PipeEnd


@dataclass(frozen=True, slots=True)
class Announcement:
    """Scheduler to worker: L1 is open.

    Attributes:
        slab: its memory.
        wait: whether the engine's start waits for the workers. They then pin without pauses.
    """

    slab: SlabDescriptor
    wait: bool = False

    def to_line(self) -> bytes:
        """Return the message as a line, short enough (PIPE_BUF) to be written whole or not."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of(cls, line: bytes) -> Announcement:
        """Read a line.

        Raises:
            ValueError: if it is no announcement of a slab.
        """
        try:
            fields = json.loads(line)
            slab, wait = SlabDescriptor(**fields["slab"]), bool(fields["wait"])
            slab = replace(slab, nodes=tuple(slab.nodes))  # JSON has lists alone
            known = slab.name.startswith("kvcache-")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not an announcement of a slab: {line!r}") from error
        if not known:
            raise ValueError(f"not an announcement of a slab: {line!r}")
        return cls(slab, wait)


@dataclass(frozen=True, slots=True)
class AttachProgress:
    """Worker to scheduler: how much of L1 this rank has attached.

    Attributes:
        mapped_nbytes: bytes that are allocated and mapped, from the slab's beginning.
        pinned_nbytes: bytes that are pinned; ``None`` for a device that needs no pinned memory.
    """

    mapped_nbytes: int
    pinned_nbytes: int | None

    @property
    def nbytes(self) -> int:
        """Bytes that are ready for copies at full speed."""
        return self.mapped_nbytes if self.pinned_nbytes is None else self.pinned_nbytes

    def to_line(self) -> bytes:
        """Return the message as a line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of(cls, line: bytes) -> AttachProgress:
        """Read a line.

        Raises:
            ValueError: if `to_line` did not make it.
        """
        try:
            fields = json.loads(line)
            mapped, pinned = fields["mapped_nbytes"], fields["pinned_nbytes"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not the progress of a worker: {line!r}") from error
        if type(mapped) is not int or type(pinned) not in (int, type(None)):
            raise ValueError(f"not the progress of a worker: {line!r}")
        return cls(mapped, pinned)
