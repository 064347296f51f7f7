"""Files that survive a kill: written aside, synced, renamed; checksums; a lock that dies with its process.

Nothing here knows of runs or stages; distill.store does.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.ENOLCK,
    errno.ENOTSUP,
}
# What torch.save says when the file system took only a part of a file; it keeps no code.
_CUT_SHORT = ("inline_container", "iostream error", "PytorchStreamWriter")
_LOCKS: dict[str, int] = {}  # lock file -> descriptor held by this process


def _forget_inherited_locks() -> None:
    # A forked worker shares the lock's open file: outliving a killed parent, it would keep the run locked.
    for descriptor in _LOCKS.values():
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_forget_inherited_locks)


def take_lock(path: Path) -> bool:
    """True if this process now holds the lock file at `path`, False if it already did; StoreError names who holds it.

    The kernel frees the lock when the process ends, however it ends.
    """
    name = str(path.resolve())
    held = _LOCKS.get(name)
    if held is not None and path.exists() and os.path.samestat(os.fstat(held), path.stat()):
        return False
    release_lock(path)  # held, but the file was removed and made again: that lock guards nothing any more
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace")
        os.close(descriptor)
        raise StoreError(
            f"another launch is writing this run: {holder}",
            where=str(path.parent),
            remedy="Wait until it ends, stop it, or set another run.name.",
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    _LOCKS[name] = descriptor
    return True


def release_lock(path: Path) -> None:
    """Gives the lock back; does nothing if this process does not hold it."""
    descriptor = _LOCKS.pop(str(path.resolve()), None)
    if descriptor is not None:
        os.close(descriptor)


def plain(value: Any, where: Path) -> Any:
    """The value as JSON gives it back (tuples become lists, keys become text): what is compared is what is stored."""
    return json.loads(_to_json(value, where))


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value, the same for any order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_path(path: Path) -> Path:
    """`.<name>.tmp-<pid>` beside `path`: same file system, hidden, and its owner can be looked up."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def remove_stale(folder: Path) -> None:
    """Removes temporary files and folders whose process no longer runs. Call it while nothing of ours is being written:
    names with our own pid are left over from an earlier process that had it."""
    for entry in folder.glob(".*.tmp-*"):
        pid = entry.name.rpartition("-")[2]
        if not pid.isdigit() or (int(pid) != os.getpid() and _alive(int(pid))):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, as another user
    return True


def sync(path: Path) -> None:
    """fsync of a file, or of a folder: without the folder's, a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; it becomes `path` in one durable step, or is removed on any error."""
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one step: a reader sees the old file or the new one, never a part. NaN is refused."""
    text = _to_json(value, path, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str) -> dict:
    """The JSON object in `path`; StoreError with `remedy` if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot be read: {error}", where=str(path), remedy=remedy) from error
    if not isinstance(value, dict):
        raise StoreError("is not a JSON object", where=str(path), remedy=remedy)
    return value


def _to_json(value: Any, where: Path, **style: Any) -> str:
    try:
        return json.dumps(value, default=_as_json, allow_nan=False, ensure_ascii=False, **style)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"would hold a value that JSON cannot carry: {error}",
            where=str(where),
            remedy="Use finite numbers, text, lists and objects.",
        ) from error


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{value!r} of type {type(value).__name__}")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into a StoreError naming `folder`; every other error passes through."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # Libraries written in Rust and C++ raise errors of their own class with only a text.
        says = str(error) if number is None else ""
        cut_short = any(text in says for text in _CUT_SHORT)
        if number in _FULL or "No space left on device" in says or cut_short:
            what = "a file could not be written to its end" if cut_short else "the disk is full"
            raise StoreError(
                f"{what}: {_free_bytes(folder)} bytes are free",
                where=str(folder),
                remedy="Free some space or move the run to another disk (run.dir), then run again: "
                "every finished shard is kept.",
            ) from error
        if number in _REFUSED:
            raise StoreError(
                f"cannot be written: {os.strerror(number)}",
                where=str(folder),
                remedy="Set run.dir to a folder on a disk that you may write to.",
            ) from error
        raise


def _free_bytes(folder: Path) -> int | str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return "an unknown number of"
