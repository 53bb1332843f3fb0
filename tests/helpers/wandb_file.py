"""The records of an offline wandb run, read back: LevelDB's log format around protocol buffers, every CRC checked."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, FILE_HEADER = 32768, struct.Struct("<IHB"), 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(folder: Path) -> list[Any]:
    """All records of the newest offline run below ``folder``."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2  # its classes are made when it is imported
    file = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))[-1]
    found = []
    for message in _messages(file.read_bytes()):
        record = protocol.Record()
        record.ParseFromString(message)
        found.append(record)
    return found


def _messages(content: bytes) -> Iterator[bytes]:
    position, partial = FILE_HEADER, b""
    while position < len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        checksum, size, kind = HEADER.unpack_from(content, position)
        data = content[position + HEADER.size : position + HEADER.size + size]
        assert zlib.crc32(bytes([kind]) + data) == checksum, f"a damaged record at byte {position}"
        position += HEADER.size + size
        partial = data if kind in (FULL, FIRST) else partial + data
        if kind in (FULL, LAST):
            yield partial


def history(found: list[Any]) -> dict[str, list[str]]:
    """Metric name -> its values as JSON texts, in order."""
    values: dict[str, list[str]] = {}
    for record in found:
        for item in record.history.item if record.HasField("history") else []:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    return values
