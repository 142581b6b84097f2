"""Files that training continues from: written whole or not at all, checked when read, and used by one run at a time."""

import contextlib
import errno
import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["KINDS", "FitState", "explain", "load", "reserved", "save"]

#: First entry of every checkpoint, so that no other file is mistaken for one.
FORMAT = "pyro_flowguides fit 4"
#: What the entry ``"kind"`` of a checkpoint says about its contents.
KINDS = {
    "fit": "a checkpoint of fit",
    "vae run": "a checkpoint of VAE training",
    "vae model": "the best.pt of VAE training",
}
#: What to do about an error of the operating system.
REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "Create the folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a folder that you may write to"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there"),
    errno.EISDIR: "Choose the name of a file",
}


class FitState(TypedDict):
    """The state of a fit; lists of tensors are by group of parameters."""

    kind: str
    settings: dict[str, object]
    fingerprint: dict[str, dict[str, str]]  # of data, model and guide
    probe: dict[str, tuple[float, float]]
    parameters: dict[str, Tensor]
    moments: list[list[Tensor]]  # of Adam, with the number of steps
    scales: list[Tensor]
    schedule: dict[str, object]
    generator: Tensor
    global_generator: Tensor
    history: list[float]
    average: list[Tensor]  # of the iterates; empty before averaging
    counts: list[int]  # of dropped particles, failed steps in a row, averaged iterates
    start: str
    seconds: float


# -- files -------------------------------------------------------------------------------------------------------------


def save(path: str | Path, state: Mapping[str, object]) -> None:
    """Write tensors, numbers, strings, lists and dicts; an interruption leaves the earlier file as it was.

    Raises:
        OSError: if the folder does not exist or the disk is full; the earlier file is untouched.
    """
    content = io.BytesIO()  # torch hides errors of the operating system behind errors of its own
    torch.save({"format": FORMAT, **state}, content)
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(path: str | Path, kind: str | None = None) -> dict[str, object] | None:
    """Return the state in a file, or ``None`` if there is no such file.

    The file's checksums are compared, so that damage to any part of the state is found.

    Args:
        path: the file.
        kind: a key of :data:`KINDS`, if the file must be of one kind.

    Raises:
        OSError: if the file exists and cannot be opened.
        ValueError: if the file is damaged, holds a tensor that is not finite, or is of another kind.
    """
    path = Path(path)
    if not path.exists():
        return None
    with path.open("rb") as file:
        try:
            damage = _find_damage(file)
        except Exception:  # zipfile raises many errors of its own where the directory of the archive is damaged
            damage = "it is damaged or not an archive"
        if not damage:
            file.seek(0)
            try:
                state: object = torch.load(file, weights_only=True, map_location="cpu")
            except Exception:  # of any type, with advice that a file of unknown origin does not deserve
                damage = "it holds more than tensors, numbers and text, or its archive is damaged"
    if damage:
        raise ValueError(f"{path} is not a checkpoint that can be read: {damage}. {_OTHER_PATH}")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version. {_OTHER_PATH}")
    _check_kind(path, state.get("kind"), kind)
    for keys, value in tree_flatten_with_path(state)[0]:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path} is not a checkpoint to resume: {keystr(keys)} is not finite. {_OTHER_PATH}")
    return cast("dict[str, object]", state)


_OTHER_PATH = "Delete it, or choose another path"


def _find_damage(file: io.BufferedReader) -> str:
    """Describe what is wrong with an archive; empty if all of its checksums are right."""
    with zipfile.ZipFile(file) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            return "it is compressed, as no checkpoint is"
        damaged = archive.testzip()
    return "" if damaged is None else f"its part {damaged} is damaged"


def _check_kind(path: Path, found: object, kind: str | None) -> None:
    if kind is None or found == kind:
        return
    description = KINDS.get(str(found), "a checkpoint of an earlier version")
    raise ValueError(f"{path} is {description}, not {KINDS[kind]}. {_OTHER_PATH}")


def explain(error: OSError | RuntimeError, what: object, intact: str = "", repeat: str = "") -> OSError:
    """Return an error that says what could not be written and why, what is intact, and what to do.

    Args:
        error: the error of the operating system, which torch and others turn into errors of their own.
        what: what was to be written.
        intact: what is left of the run.
        repeat: how to continue the run.
    """
    kind = type(error) if isinstance(error, OSError) else OSError
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
    parts = [f"could not write {what} ({reason})" + (f": {intact}" if intact else "")]
    return kind(f"{'. '.join([*parts, REMEDIES.get(number or 0, 'Make room there or choose another path')])}{repeat}")


def _partial(path: str | Path) -> Path:
    return Path(f"{path}.partial")


# -- one run at a time -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reserved(path: str | Path, *others: str | Path) -> Iterator[None]:
    """Keep other processes and threads from a checkpoint, and remove what a killed process has left half written.

    The lock is a file beside the checkpoint, which is removed at the end. The operating system gives up the lock of a
    process that is killed. File systems without locks are used without.

    Args:
        path: the checkpoint.
        others: further files that the same run writes.

    Raises:
        BlockingIOError: if another run uses the checkpoint, naming its process.
        OSError: if the folder does not exist or cannot be written to.
    """
    lock = Path(f"{path}.lock")
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        handle = _lock(lock, path)
    except BlockingIOError:
        raise
    except OSError as error:
        raise explain(error, path) from error
    try:
        try:
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            for name in (path, *others):
                _partial(name).unlink(missing_ok=True)
        except OSError as error:
            raise explain(error, path) from error
        yield
    finally:
        with contextlib.suppress(OSError):  # a file in use cannot be removed everywhere
            lock.unlink()  # before the handle is closed: afterwards it may be the file of another run
        os.close(handle)


def _lock(lock: Path, path: str | Path) -> int:
    """Return the handle of a lock file that this run alone holds."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_file(handle)
            if _is_same_file(handle, lock):
                return handle
        except BlockingIOError:
            owner = os.read(handle, 20).decode(errors="replace") or "unknown"
            os.close(handle)
            message = f"{path} is in use by another run (process {owner}): wait until it ends, or choose another path"
            raise BlockingIOError(message) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner has just removed it


def _lock_file(handle: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # the file system has no locks
            raise


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
