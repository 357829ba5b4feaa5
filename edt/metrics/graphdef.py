"""Reading a TensorFlow GraphDef without TensorFlow: the part of the protobuf format that a frozen
graph uses.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edt.utils.errors import UserError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
DTYPES = {1: np.dtype("<f4"), 3: np.dtype("<i4")}


@dataclass
class GraphNode:
    """A node of the graph; ``attributes`` map a name to its serialized AttrValue."""

    op: str = ""
    inputs: list[str] = field(default_factory=list)
    attributes: dict[str, memoryview] = field(default_factory=dict)

    def flag(self, name: str) -> bool:
        """A boolean attribute, false when it is not stored."""
        return bool(_last(self.attributes.get(name, memoryview(b"")), 5, 0))

    def number(self, name: str) -> float:
        """A float attribute, 0 when it is not stored."""
        return _float(_last(self.attributes.get(name, memoryview(b"")), 4, bytes(4)))

    def array(self) -> np.ndarray:
        """The value of a Const of float32 or int32."""
        return _tensor(_last(self.attributes["value"], 8, memoryview(b"")))


def read_graph(path: Path) -> dict[str, GraphNode]:
    """The nodes of a serialized GraphDef by name.

    Raises:
        UserError: the file cannot be read or is no GraphDef.
    """
    try:
        graph = memoryview(path.read_bytes())
        nodes = dict(_node(value) for number, value in _fields(graph) if number == 1)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, IndexError, TypeError, struct.error):
        nodes = {}
    if not nodes:
        raise UserError(f"{path} is not a TensorFlow GraphDef; it may be damaged, fetch it again")
    return nodes


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of a serialized message; text, bytes and sub-messages as views into
    it.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == BYTES:
            size, position = _varint(message, position)
        else:
            size = {FIXED64: 8, FIXED32: 4}[wire_type] if wire_type in (FIXED64, FIXED32) else -1
        if size < 0 or position + size > len(message):
            raise ValueError("not a protobuf message")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _last(message: memoryview, number: int, default):
    """The value of a field that occurs once; protobuf lets the last one win."""
    return dict(_fields(message)).get(number, default)


def _float(data: memoryview | bytes) -> float:
    return struct.unpack("<f", data)[0]


def _node(message: memoryview) -> tuple[str, GraphNode]:
    """NodeDef: 1 name, 2 op, 3 input, 5 attribute (map: 1 key, 2 value)."""
    name, node = "", GraphNode()
    for number, value in _fields(message):
        if number == 1:
            name = str(value, "utf-8")
        elif number == 2:
            node.op = str(value, "utf-8")
        elif number == 3:
            node.inputs.append(str(value, "utf-8"))
        elif number == 5:
            entry = dict(_fields(value))
            node.attributes[str(entry[1], "utf-8")] = entry.get(2, memoryview(b""))
    return name, node


def _tensor(message: memoryview) -> np.ndarray:
    """TensorProto: 1 dtype, 2 shape, 4 bytes of the content, 5 and 7 packed float and int
    values.
    """
    parts = dict(_fields(message))
    dtype = DTYPES[parts[1]]
    dimensions = [value for number, value in _fields(parts.get(2, memoryview(b""))) if number == 2]
    shape = [_last(dimension, 1, 0) for dimension in dimensions]
    if 4 in parts:
        return np.frombuffer(parts[4], dtype).reshape(shape)
    if dtype == DTYPES[1]:
        values = np.frombuffer(parts.get(5, bytes(4)), dtype)
    else:
        values = np.array(_packed_ints(parts.get(7, b"\0")), dtype)
    # Fewer values than elements: the last one is repeated.
    return np.append(
        values, np.repeat(values[-1:], np.prod(shape, dtype=int) - len(values))
    ).reshape(shape)


def _packed_ints(data: int | memoryview) -> list[int]:
    if isinstance(data, int):
        return [data]
    values, position = [], 0
    while position < len(data):
        value, position = _varint(data, position)
        values.append(value)
    return values
