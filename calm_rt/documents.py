"""Documents: the texts in files, folders and JSON lines, in a fixed order."""

import json
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from calm_rt.ops.check import check

PathLike = str | os.PathLike[str]
JSON_LINES = {".jsonl", ".ndjson"}
SHARDS = "shards.json"  # in a folder of token shards
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def default_corpus() -> list[Path]:
    """The source files of the running interpreter's standard library without its tests.

    About 12 MB.
    """
    library = Path(sysconfig.get_path("stdlib"))
    names = (path for path in _files(library) if path.suffix == ".py")
    kept = (path for path in names if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts))
    return [path for path in kept if _is_text(path)]


def read_documents(
    corpus: PathLike | Sequence[PathLike],
    suffixes: Sequence[str] | None = None,
    max_characters: int = 100_000,
) -> Iterator[str]:
    """Every document of the corpus, in the order of the paths and, in folders, of the file names.

    corpus: paths. A file is utf-8 text, or JSON lines with a "text" each (.jsonl, .ndjson, and a
        .json file that is named itself). Of a folder every such file is read, apart from hidden
        ones and folders of token shards; what is not utf-8 text is skipped with a warning.
    suffixes: which files of a folder are read, such as [".py", ".md"]; None for all.
    max_characters: longer text files are cut at blank lines or line ends into several documents, so
        that a corpus of one big file can be split into training and held-out documents. JSON lines
        are never cut.
    raises: ValueError for a path that does not exist, a named file that is not utf-8 text, a bad
        JSON line, no text.
    """
    paths = [Path(p) for p in ([corpus] if isinstance(corpus, str | os.PathLike) else corpus)]
    if not paths:
        raise ValueError("corpus: no path is given; name text files, folders or .jsonl files")
    for path in paths:
        if not path.exists():
            raise ValueError(f"corpus: {path} does not exist; name a text file, folder or .jsonl")
    check(max_characters >= 1, "max_characters", "at least 1", max_characters)
    return _documents(paths, suffixes, max_characters)


def _documents(
    paths: list[Path], suffixes: Sequence[str] | None, max_characters: int
) -> Iterator[str]:
    skipped: list[Path] = []
    empty = True
    for path in paths:
        for file, named in _expand(path, suffixes):
            suffix = file.suffix.lower()
            if suffix in JSON_LINES or (named and suffix == ".json"):
                texts = _json_lines(file)
            else:
                try:
                    texts = _cut(_read_text(file), max_characters)
                except ValueError:
                    if named:
                        raise
                    skipped.append(file)
                    continue
            for text in texts:
                empty = False
                yield text
    if empty:
        found = f" ({len(skipped)} files are not utf-8 text)" if skipped else ""
        where = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
        raise ValueError(f"corpus: no text in {where}{found}; give utf-8 text or .jsonl files")
    if skipped:
        files = f"{len(skipped)} files that are not utf-8 text, the first {skipped[0]}"
        warnings.warn(f"corpus: skipped {files}", stacklevel=2)


def _expand(path: Path, suffixes: Sequence[str] | None) -> Iterator[tuple[Path, bool]]:
    """The files of a path, and whether each was named by the user."""
    if not path.is_dir():
        yield path, True
        return
    for file in _files(path):
        if suffixes is None or file.suffix in suffixes:
            yield file, False


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted; hidden ones and folders of token shards are left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if SHARDS in names:  # made of what stands beside it
            folders.clear()
            continue
        for name in sorted(names):
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _is_text(path: Path) -> bool:
    try:
        _read_text(path)
    except ValueError:
        return False
    return True


def _read_text(path: Path) -> str:
    """The text of a file, line ends as they are."""
    data = path.read_bytes()
    null = data.find(b"\0")
    if null >= 0:
        raise ValueError(
            f"corpus: {path} is a binary file (NUL at byte {null}); give utf-8 text or .jsonl"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus: {path} is not utf-8 text (byte {error.start}); "
            f"convert it, for example with iconv -f latin1 -t utf-8"
        ) from None


def _json_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))["text"]
                text.encode("utf-8")  # JSON can spell halves of surrogate pairs, which are no text
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f'corpus: {path} line {number} has no "text" of characters '
                    f"({type(error).__name__}: {reason}); give one object such as "
                    f'{{"text": "..."}} a line'
                ) from None
            if text:
                yield text


def _cut(text: str, max_characters: int) -> Iterator[str]:
    """Pieces of at most max_characters that together are the text; none for an empty text."""
    start = 0
    while len(text) - start > max_characters:
        end = start + max_characters
        for mark in ("\n\n", "\n"):
            found = text.rfind(mark, start + max_characters // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
