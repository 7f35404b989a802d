"""Files that appear whole or not at all."""

import tempfile
from collections.abc import Iterator
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
