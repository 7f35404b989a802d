"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(folder: Path, name: str = "folder") -> Iterator[Path]:
    """A temporary folder inside `folder`; finished files are moved out of it with os.replace.

    folder: made if missing.  name: of the argument, for the error.
    raises: ValueError where nothing can be written; any OSError of the body, such as a full disk,
        stays what it is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder)
    except OSError as error:
        raise ValueError(
            f"{name}: cannot write into {folder} ({error.strerror}); name one that you may write"
        ) from None
    with scratch as path:
        yield Path(path)


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` write a temporary file beside the path, which then takes the path's place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors writes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a crash may leave the new name on empty contents
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
