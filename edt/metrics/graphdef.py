"""Reads a TensorFlow GraphDef without TensorFlow.

The weights of FID exist as a frozen graph only, and TensorFlow is a large, optional dependency.
So this module parses the part of the protobuf format that a frozen graph uses. It needs no schema:
the field numbers are written at each function.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edt.utils.errors import UserError

# Wire types: how the value of a field is stored.
VARINT = 0
BYTES = 2
FIXED_SIZES = {1: 8, 5: 4}  # wire type -> bytes

FLOAT32 = np.dtype("<f4")
INT32 = np.dtype("<i4")
DTYPES = {1: FLOAT32, 3: INT32}  # TensorFlow's DataType -> NumPy's

EMPTY = memoryview(b"")
ZERO_FLOAT = memoryview(bytes(4))
ZERO_VARINT = memoryview(bytes(1))


@dataclass
class GraphNode:
    """A node of the graph."""

    op: str = ""
    inputs: list[str] = field(default_factory=list)
    attributes: dict[str, memoryview] = field(default_factory=dict)  # name -> serialized AttrValue

    def flag(self, name: str) -> bool:
        """A boolean attribute, false if it is not stored."""
        return bool(_int_field(self.attributes.get(name, EMPTY), 5))

    def number(self, name: str) -> float:
        """A float attribute, 0 if it is not stored."""
        data = _bytes_field(self.attributes.get(name, EMPTY), 4, ZERO_FLOAT)
        return struct.unpack("<f", data)[0]

    def array(self) -> np.ndarray:
        """The value of a Const node of float32 or int32.

        Raises:
            KeyError, ValueError or IndexError: the node has no such value.
        """
        return _tensor(_bytes_field(self.attributes["value"], 8))


def read_graph(path: Path) -> dict[str, GraphNode]:
    """The nodes of a serialized GraphDef by name.

    Raises:
        UserError: the file cannot be read or is no GraphDef.
    """
    try:
        graph = memoryview(path.read_bytes())
        # GraphDef: 1 node.
        nodes = dict(_node(_view(value)) for number, value in _fields(graph) if number == 1)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); give a readable .pb file"
        ) from None
    except (ValueError, IndexError, KeyError):
        nodes = {}
    if not nodes:
        raise UserError(
            f"{path} is not a TensorFlow GraphDef; it may be damaged, download it again"
        )
    return nodes


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of a serialized message.

    Text, bytes and sub-messages are views into ``message``, so that 96 MB of weights are not
    copied.
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
        elif wire_type in FIXED_SIZES:
            size = FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if position + size > len(message):
            raise ValueError("a field is longer than its message")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of variable length at ``position``, and the position behind it.

    Each byte holds 7 bits, the lowest first. Its highest bit says whether another byte follows.
    """
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _view(value: int | memoryview) -> memoryview:
    """The value of a field that must be text, bytes or a sub-message."""
    if isinstance(value, int):
        raise ValueError("a field holds an integer, not bytes")
    return value


def _bytes_field(message: memoryview, number: int, default: memoryview = EMPTY) -> memoryview:
    """The text, bytes or sub-message of a field that occurs once.

    If it occurs again, protobuf lets the last one count, as a dictionary does.
    """
    return _view(dict(_fields(message)).get(number, default))


def _int_field(message: memoryview, number: int, default: int = 0) -> int:
    """The integer of a field that occurs once."""
    value = dict(_fields(message)).get(number, default)
    if not isinstance(value, int):
        raise ValueError("a field holds bytes, not an integer")
    return value


def _node(message: memoryview) -> tuple[str, GraphNode]:
    """NodeDef: 1 name, 2 op, 3 input, 5 attribute (map: 1 key, 2 value)."""
    name, node = "", GraphNode()
    for number, value in _fields(message):
        if number == 1:
            name = str(_view(value), "utf-8")
        elif number == 2:
            node.op = str(_view(value), "utf-8")
        elif number == 3:
            node.inputs.append(str(_view(value), "utf-8"))
        elif number == 5:
            entry = dict(_fields(_view(value)))
            key = str(_view(entry[1]), "utf-8")
            node.attributes[key] = _view(entry.get(2, EMPTY))
    return name, node


def _tensor(message: memoryview) -> np.ndarray:
    """TensorProto: 1 dtype, 2 shape, 4 content, 5 packed floats, 7 packed integers."""
    parts = dict(_fields(message))
    dtype = DTYPES[_int_field(message, 1)]
    # TensorShapeProto: 2 dimension (1 size).
    sizes = _fields(_view(parts.get(2, EMPTY)))
    shape = [_int_field(_view(value), 1) for number, value in sizes if number == 2]
    if 4 in parts:
        return np.frombuffer(_view(parts[4]), dtype).reshape(shape)
    if dtype == FLOAT32:
        values = np.frombuffer(_view(parts.get(5, ZERO_FLOAT)), dtype)
    else:
        values = np.array(_packed_ints(parts.get(7, ZERO_VARINT)), dtype)
    # A constant tensor stores its value once: the last value is repeated to fill the shape.
    missing = np.prod(shape, dtype=int) - len(values)
    return np.append(values, np.repeat(values[-1:], missing)).reshape(shape)


def _packed_ints(data: int | memoryview) -> list[int]:
    if isinstance(data, int):  # one value is stored without packing
        return [data]
    values = []
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        values.append(value)
    return values
