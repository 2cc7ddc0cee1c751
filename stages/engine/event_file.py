"""TensorBoard's event files, for curves: the few lines of the format that scalars need, instead of a dependency.

- a file is a row of TFRecords (length, its checksum, data, its checksum), each an `Event` message of protocol buffers;
  the numbers in comments are the messages' field numbers in tensorboard/compat/proto/{event,summary}.proto
- a resumed run writes a file of its own whose first event tells TensorBoard to forget the steps that are done again
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """Scalars by step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step`: the steps after this one follow."""
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.iterdir()))  # of this start: TensorBoard reads the files in the order of their names
        name = f"events.out.tfevents.{number:04d}"
        self._file = (folder / name).open("ab")
        self._append(0, _bytes(3, b"brain.Event:2"))  # file_version
        if first_step:
            self._append(first_step + 1, _bytes(7, _varint_field(1, 1)))  # session_log, status START

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append the numbers of one step."""
        values = b"".join(_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in numbers.items())
        self._append(step, _bytes(5, values))  # summary: value (1) of tag (1) and simple_value (2)

    def close(self) -> None:
        """Close the file; everything is in it already."""
        self._file.close()

    def _append(self, step: int, content: bytes) -> None:
        data = struct.pack("<Bd", 1 << 3 | 1, time.time()) + _varint_field(2, step) + content  # wall_time 1, step 2
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))
        self._file.flush()


def _varint(value: int) -> bytes:
    pieces = []
    while value > 0x7F:
        pieces.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*pieces, value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # CRC-32C (Castagnoli), reflected
        table.append(value)
    return table


_CRC = _crc_table()


def _checksum(data: bytes) -> bytes:
    """TFRecord's masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
