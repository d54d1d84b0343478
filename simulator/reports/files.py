"""Files that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simulator.errors import InputError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to it when the block ends well.

    An exception inside the block, or a process that is killed, leaves what was there before.

    Raises
    ------
    InputError
        If the folder cannot be created or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory beside `path`; its entries move into `path` when the block ends well.

    What `path` holds under other names stays; an entry of the same name is replaced.

    Raises
    ------
    InputError
        If `path` is a file, or cannot be created or written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError("expected a directory, this is a file", place=str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if not path.exists():
            os.rename(temporary, path)
            return
        for entry in sorted(temporary.iterdir()):
            target = path / entry.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            os.replace(entry, target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot be written: {error.strerror or error}", place=str(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
