"""Reading foreign files safely, and writing results without ever leaving half a file."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from simulator.errors import InputError

#: Largest input (after decompression) that a reader takes, bytes: larger than any profiler trace
#: that fits in memory as Python objects, small enough to stop a decompression bomb.
MAX_BYTES = 4 * 2**30
_CHUNK = 1 << 20


def optional(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional dependency.

    Raises
    ------
    InputError
        With the install command, if the package is absent or does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{what} needs the package {module.split('.')[0]!r} ({error}); "
            f"install it with: pip install 'cluster-simulator[{extra}]'"
        ) from None


def read_bytes(path: str | Path, *, limit: int = MAX_BYTES) -> bytes:
    """The content of a file, gunzipped where it starts with gzip's magic number.

    Raises
    ------
    InputError
        If the file is missing, unreadable, broken gzip, or larger than `limit` bytes.
    """
    place = str(path)
    try:
        if os.path.getsize(path) > limit:
            raise InputError(f"larger than {limit} bytes", place=place)
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError("no such file", place=place) from None
    except IsADirectoryError:
        raise InputError("is a folder; expected a file", place=place) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", place=place) from None
    return gunzip(data, place=place, limit=limit)


def gunzip(data: bytes, *, place: str | None = None, limit: int = MAX_BYTES) -> bytes:
    """`data` decompressed if it is gzip, else unchanged; raises `InputError` beyond `limit`."""
    if not data.startswith(b"\x1f\x8b"):
        return data
    parts, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                if size > limit:
                    raise InputError(f"decompresses to more than {limit} bytes", place=place)
                parts.append(chunk)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"broken gzip: {error}", place=place) from None
    except Exception as error:  # zlib.error, which has no common base with the above
        if isinstance(error, InputError):
            raise
        raise InputError(f"broken gzip: {error}", place=place) from None
    return b"".join(parts)


def parse_json(data: bytes | str, *, place: str | None = None) -> Any:
    """JSON with every failure (syntax, encoding, depth) as `InputError`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", place=place) from None


def listed(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of a folder in the order of their names, a single file, or the given ones.

    Raises
    ------
    InputError
        If the folder cannot be read.
    """
    if not isinstance(paths, str | Path):
        return [Path(path) for path in paths]
    path = Path(paths)
    try:
        return sorted(path.iterdir()) if path.is_dir() else [path]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", place=str(path)) from None


def read_text(path: str | Path, *, limit: int = 64 * 2**20) -> str:
    """A UTF-8 text file (gzip allowed); raises `InputError`."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: {error}", place=str(path)) from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place only when the block ends without an error.

    Raises
    ------
    InputError
        If the folder does not exist or cannot be written.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise InputError("is a folder; expected a file name", place=str(target))
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be written: {error}", place=str(target)) from None
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except OSError as error:
        raise InputError(f"cannot be written: {error}", place=str(target)) from None
    finally:
        if os.path.exists(name):
            os.unlink(name)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write files into; they appear in `path` when the block ends without an error.

    Raises
    ------
    InputError
        If the folder cannot be made or written.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_dir():
            raise InputError("is a file; expected a folder", place=str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
            inner = Path(name) / "files"
            inner.mkdir()
            yield inner
            if target.exists():
                for file in sorted(inner.iterdir()):
                    os.replace(file, target / file.name)
            else:
                os.replace(inner, target)
    except OSError as error:
        raise InputError(f"cannot be written: {error}", place=str(target)) from None


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file all at once; raises `InputError`."""
    with replacing(path) as stream:
        stream.write(data)
