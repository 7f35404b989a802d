"""Torch files: zip archives whose pickle makes a state dict and nothing else.

torch.load(weights_only=True) runs no foreign code, but it calls what allocates: bytearray, tensor
and storage types. So the pickle is followed first, operation by operation and without making
anything, as to what it would call on what.
"""

import pickletools
import struct
import zipfile
from pathlib import Path

import torch

ORDERED_DICT = "collections.OrderedDict"
CALLED = {ORDERED_DICT, "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
STORAGES = {  # named in a tensor's persistent id, never called
    f"torch.{kind}Storage"
    for kind in "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()
}
PUT, GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
# what else torch's own reader knows, but for NEWOBJ, which no state dict has
PLAIN = set(
    "PROTO STOP MARK NONE NEWFALSE NEWTRUE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT EMPTY_SET "
    "BINPERSID".split()
)
FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS"}  # what lies below stays
MARK = "mark"
END, LARGE_END = 22, 98  # bytes of what ends an archive's directory, without and with 64-bit sizes


def check_archive(path: Path) -> None:
    """Raises ValueError unless the file is a zip archive of a state dict, stored as it is.

    torch allocates what an entry claims to be unpacked; torch before 1.6 wrote no archive, and its
    files are read by allocating what they claim.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("no zip archive, as torch writes since 1.6")
    size = path.stat().st_size
    _check_directory(path, size)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            plain = entry.compress_type == zipfile.ZIP_STORED
            if not plain or not entry.file_size == entry.compress_size <= size:
                raise ValueError(f"entry {entry.filename} is packed, or larger than the file")
    # by torch's own reader: the entry that torch.load will take, were there several
    check_pickle(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))


def _check_directory(path: Path, size: int) -> None:
    """Python finds an archive's directory by its size, torch by its offset: both must be one."""
    with path.open("rb") as file:
        file.seek(max(0, size - LARGE_END))
        tail = file.read().rjust(LARGE_END, b"\0")
    end, start = tail[-END:], size - END
    length, offset = struct.unpack("<II", end[12:20])
    if tail[-END - 20 : -END].startswith(
        b"PK\6\7"
    ):  # as torch writes them, of more than 4 GB or not
        start = size - LARGE_END
        (found,) = struct.unpack("<Q", tail[-END - 12 : -END - 4])
        _require(found == start and tail.startswith(b"PK\6\6"), "a directory without an end")
        length, offset = struct.unpack("<QQ", tail[40:56])
    last = end.startswith(b"PK\5\6") and end.endswith(b"\0\0")  # no comment behind
    _require(last and offset + length == start, "a directory that is not at the end")


def check_pickle(data: bytes) -> None:
    """Raises ValueError for a pickle that calls anything but what a state dict is made by.

    The stack holds the name of what could be called or built upon, None for all else.
    """
    stack: list[str | None] = []
    memo: dict[int, str | None] = {}
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name == "GLOBAL":
            found = argument.replace(" ", ".", 1)
            _require(found in CALLED | STORAGES, f"{found} is no part of a state dict")
            stack.append(found)
        elif name in PUT:
            memo[argument] = stack[-1]
        elif name in GET:
            stack.append(memo[argument])
        elif name == "REDUCE":
            _, function = stack.pop(), stack.pop()
            _require(function in CALLED, f"a call of {function or 'no function'}")
            stack.append(f"{function}()")
        elif name == "BUILD":  # a state dict's _metadata; a tensor would be resized
            stack.pop()
            _require(stack[-1] == f"{ORDERED_DICT}()", f"state for {stack[-1] or 'a value'}")
        elif name in FILLING | PLAIN:
            newer = name == "PROTO" and argument > 3
            _require(not newer, f"pickle protocol {argument}; torch.save's own is 2")
            _pop(stack, operation)
            if name == "MARK":
                stack.append(MARK)
            elif name not in FILLING:
                stack += [None] * len(operation.stack_after)
        else:
            raise ValueError(f"operation {name}, which no state dict has")


def _pop(stack: list[str | None], operation: pickletools.OpcodeInfo) -> None:
    """Takes off what an operation takes, but for a container that it fills."""
    if pickletools.markobject in operation.stack_before:
        while stack.pop() != MARK:
            pass
        return
    count = len(operation.stack_before) - (operation.name in FILLING)
    if count:
        del stack[-count:]


def _require(condition: bool, got: str) -> None:
    if not condition:
        raise ValueError(got)
