"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import json
import os
import tempfile
from pathlib import Path as File
from typing import Any


def write_atomic(file: str | os.PathLike[str], data: bytes | str) -> None:
    """Write aside, fsync, rename, then fsync the folder; the folder is made where it is missing."""
    target = File(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        os.chmod(aside, 0o666 & ~_mask())
        with os.fdopen(handle, "wb") as out:
            out.write(data.encode() if isinstance(data, str) else data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, target)
    except BaseException:
        File(aside).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _mask() -> int:
    """The process's file mode mask: temporary files are private, the finished one is like any other."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(file: str | os.PathLike[str], data: Any) -> None:
    """The same for JSON, indented and in a stable order, so that two runs can be compared line by line."""
    write_atomic(file, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")
