"""The digest of weight files: equal for equal files, cheap at any size.

1. It depends on names, sizes and bytes alone: not on the path, the times of the files or the host.
   Two hosts that mount the same files at different places get the same digest.
2. A file up to 64 KiB is read whole, settings and code up to 64 MiB. Of a safetensors file the
   whole header is read (every tensor's name, type, shape and offsets), and of every tensor the
   first page, the last one and two between them, or all of it up to 64 KiB. A ``torch.save``
   archive has a CRC-32 of each of its members in its directory, which is read whole. Of any other
   file a page of every 4 MiB is read.
3. A change outside of these bytes is not found: a few numbers of a large tensor, edited in place.
   A fine-tune changes nearly every number of the tensors that it trains.
4. A snapshot of a Hugging Face cache is its commit, which is a hash of every file's content.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

PAGE: Final = 4096
WHOLE_NBYTES: Final = 64 << 10  # read whole, files and tensors
SETTINGS_NBYTES: Final = 64 << 20  # read whole, settings and code: an edit may keep their size
STRIDE_NBYTES: Final = 4 << 20  # between the pages of a file of unknown structure
HEADER_NBYTES: Final = 100 << 20  # the largest header that safetensors itself reads
THREADS: Final = 8

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".npz", ".npy", ".tensors"}
_SETTINGS = {".json", ".py", ".yaml", ".yml"}  # quantization, scales of the KV cache, model code
_IRRELEVANT = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.json|generation_config\.json"
    r"|chat_template.*|trainer_state\.json|training_args\.bin|optimizer\..*|scheduler\.(pt|bin)"
    r"|rng_state.*"
)
"""Files that change no block: prompts are token ids, and a checkpoint may have files that only
training reads."""

_LINKS: Final = 40  # on the way to a file, as many as Linux follows

_COMMIT = re.compile(r"[0-9a-f]{40}")

_STARTING_S: Final = 0.1
"""The minimum time from a process's start until it loads weights. The kernel counts a process's age
in hundredths of a second, and an engine may start right after the files were written."""


class UnknownWeightsError(Exception):
    """The weights cannot be identified; the message is the reason."""


def identify(place: Path, since_ns: int | None = None) -> str:
    """Return the commit or the digest of the weights in ``place``, a folder or a single file.

    Args:
        place: where they are.
        since_ns: a time before they were loaded, in nanoseconds since 1970.

    Raises:
        UnknownWeightsError: if there are none, if they cannot be read, or if they may have been
            other files at ``since_ns``.
    """
    try:
        files = weight_files(place)
        if not any(Path(name).suffix in _WEIGHTS for name in files):
            raise UnknownWeightsError(f"there are no weight files in {str(place)!r}")
        revision = commit(place, files.values())
        found = revision or f"digest {digest(files)}"
        # The blobs of a snapshot never change, and may be downloaded while the engine starts.
        aged = () if revision else files.values()
        if since_ns is not None and changed_since(place, aged, since_ns):
            raise UnknownWeightsError(f"files in {str(place)!r} changed after the engine started")
        return found
    except (OSError, ValueError) as error:
        raise UnknownWeightsError(f"the weight files cannot be read: {error}") from error


def started_ns() -> int:
    """Return a time after this process started and before any weights were loaded for it.

    In nanoseconds since 1970.
    """
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time_ns() - int((age_s - _STARTING_S) * 1e9)


def weight_files(place: Path) -> dict[str, Path]:
    """Return files with weights, settings or code, by name below ``place``, one subfolder deep.

    Hidden files and those of a tokenizer or an optimizer are left out.
    """
    if place.is_file():
        return {place.name: place}
    found = {}
    for path in [*place.glob("*"), *place.glob("*/*")]:
        name = path.relative_to(place)
        # The engine reads every safetensors file, whatever its name.
        irrelevant = path.suffix != ".safetensors" and _IRRELEVANT.fullmatch(path.name)
        wanted = path.suffix in _WEIGHTS | _SETTINGS and not irrelevant
        if wanted and not any(part.startswith(".") for part in name.parts) and path.is_file():
            found[name.as_posix()] = path
    return found


def commit(place: Path, files: Iterable[Path]) -> str | None:
    """Return the commit of a snapshot in a Hugging Face cache; ``None`` for any other folder.

    A folder's name is not enough: every file must be the cache's own link into its blobs, which the
    cache names by content and never writes again.
    """
    folder = place.resolve()
    repository = folder.parent.parent
    if not _COMMIT.fullmatch(folder.name) or folder.parent.name != "snapshots":
        return None
    blobs = repository / "blobs"
    if any(not file.is_symlink() or file.resolve().parent != blobs for file in files):
        return None
    return f"commit {folder.name}"


def changed_since(place: Path, files: Iterable[Path], since_ns: int) -> bool:
    """Whether ``place`` may have had other ``files`` at ``since_ns``, in nanoseconds since 1970.

    Compares the time stamps that no program can set: of the files, of every link on the way to
    them, and of folders that were moved to their place.
    """
    files = list(files)
    links = [file for file in files if file.is_symlink()]
    folders = {file.parent for file in files}
    trails = {part for path in (place, *folders, *links) for part in trail(path)}
    for path in trails.union(files):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            if status.st_ctime_ns > since_ns:
                return True
        # Adding or removing an entry changes both times of a folder. Moving it changes only one.
        elif status.st_ctime_ns > since_ns >= status.st_mtime_ns:
            return True
    # A folder may be moved and then written to, for example a marker that a copy is complete.
    # Moving it also changes its parent.
    moved = {folder.resolve() for folder in folders} | {link.resolve().parent for link in links}
    return any(
        min(folder.stat().st_ctime_ns, folder.parent.stat().st_ctime_ns) > since_ns
        for folder in moved
    )


def trail(path: Path) -> Iterator[Path]:
    """Yield every folder and link on the way from the root to ``path``, and the file at its end.

    Raises:
        OSError: if there is no such file.
    """
    at, ahead, links = Path("/"), [*path.absolute().parts[:0:-1]], 0
    yield at
    while ahead:
        part = ahead.pop()
        at = at.parent if part == ".." else at / part
        yield at
        if at.is_symlink():
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = at.readlink()
            ahead += target.parts[::-1]  # joining an absolute path starts from the root
            at = at.parent


def digest(files: Mapping[str, Path]) -> str:
    """Return a hexadecimal digest of ``files``, by name.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a safetensors file is invalid.
    """
    whole = blake2b(digest_size=32, person=b"kvcache.weights")
    with ThreadPoolExecutor(THREADS, "kvcache-weights") as threads:
        for name in sorted(files):
            whole.update(json.dumps(name).encode())
            for part in _digest_of(files[name], threads):
                whole.update(part)
    return whole.hexdigest()


def _digest_of(path: Path, threads: ThreadPoolExecutor) -> Iterator[bytes]:
    file = os.open(
        path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    )  # does not wait for a FIFO's writer
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{str(path)!r} is no regular file")
        yield status.st_size.to_bytes(8, "little")
        if status.st_size <= (SETTINGS_NBYTES if path.suffix in _SETTINGS else WHOLE_NBYTES):
            yield _read(file, 0, status.st_size)
            return
        if path.suffix == ".safetensors":
            header, spans = _safetensors(file, status.st_size)
            yield header
        else:
            yield _archive(path)
            spans = [(0, status.st_size, max(2, status.st_size // STRIDE_NBYTES))]
        pieces = [piece for span in spans for piece in sampled_pieces(*span)]
        # In batches: a task for every page would cost more than reading the page.
        parts = [pieces[at : at + 64] for at in range(0, len(pieces), 64)]
        yield from threads.map(lambda part: _digest_pieces(file, part), parts)
    finally:
        os.close(file)


def _digest_pieces(file: int, pieces: list[tuple[int, int]]) -> bytes:
    part = blake2b(digest_size=32)
    for at, nbytes in pieces:
        part.update(_read(file, at, nbytes))
    return part.digest()


def sampled_pieces(begin: int, end: int, between: int = 2) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the parts to read between ``begin`` and ``end``, in bytes.

    ``between`` is the number of pages between the first page and the last one.
    """
    if end - begin <= WHOLE_NBYTES:
        yield begin, end - begin
        return
    last = end - PAGE
    for number in range(between + 2):
        yield begin + (last - begin) * number // (between + 1), PAGE


def _safetensors(file: int, size: int) -> tuple[bytes, list[tuple[int, ...]]]:
    """Return the header's bytes, and the first and the end offset of each tensor."""
    nbytes = int.from_bytes(_read(file, 0, 8), "little")
    if nbytes > min(HEADER_NBYTES, size - 8):
        raise ValueError("a safetensors file has no valid header")
    header = _read(file, 8, nbytes)
    tensors: Any = json.loads(header)
    spans: list[tuple[int, ...]] = []
    try:
        for name, tensor in tensors.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                if not 0 <= begin <= end <= size - 8 - nbytes:
                    raise ValueError(f"tensor {name!r} lies beyond the end of its file")
                spans.append((8 + nbytes + begin, 8 + nbytes + end))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("a safetensors file has no valid header") from error
    return header, spans


def _archive(path: Path) -> bytes:
    """Return names, sizes and CRC-32s of a ``torch.save`` archive; nothing for any other file."""
    if not zipfile.is_zipfile(path):
        return b""
    with zipfile.ZipFile(path) as archive:
        members = [(member.filename, member.file_size, member.CRC) for member in archive.infolist()]
    return json.dumps(members).encode()


def _read(file: int, at: int, nbytes: int) -> bytes:
    """Read exactly ``nbytes`` at offset ``at``."""
    parts = []
    while nbytes:
        part = os.pread(file, nbytes, at)
        if not part:
            raise ValueError("a weight file ended while it was read")
        parts.append(part)
        at, nbytes = at + len(part), nbytes - len(part)
    return b"".join(parts)
