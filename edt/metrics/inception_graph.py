"""The 2015 Inception graph behind FID, as data: its convolution units, pools and joins in the order
they run.

Names are those of ``classify_image_graph_def.pb`` (archive inception-2015-12-05), whose weights are
read by name."""

from collections import Counter
from typing import Literal, NamedTuple

Padding = Literal["SAME", "VALID"]


class Unit(NamedTuple):
    """Convolution, batch norm, ReLU; ``kernel`` is (height, width)."""

    name: str
    source: str
    kernel: tuple[int, int]
    channels_in: int
    channels_out: int
    stride: int
    padding: Padding


class Pool(NamedTuple):
    """3 x 3 pooling; an average counts only the pixels inside the image."""

    name: str
    source: str
    op: Literal["MaxPool", "AvgPool"]
    stride: int
    padding: Padding


class Join(NamedTuple):
    """Concatenation along the channels."""

    name: str
    sources: tuple[str, ...]


Node = Unit | Pool | Join

# A chain of steps: kernel height x width, "/2" for stride 2, "v" for no padding at stride 1, output
# channels; "max" and "avg" are pools. The parts around a "|" share their input, and both go into
# the join.
STEM = "3x3/2 32, 3x3v 32, 3x3 64, max/2, 1x1v 80, 3x3v 192, max/2"


def _block_35(pool: int) -> list[tuple[str, str]]:
    return [
        ("", "1x1 64"),
        ("tower/", "1x1 48, 5x5 64"),
        ("tower_1/", "1x1 64, 3x3 96, 3x3 96"),
        ("tower_2/", f"avg, 1x1 {pool}"),
    ]


def _block_17(n: int) -> list[tuple[str, str]]:
    return [
        ("", "1x1 192"),
        ("tower/", f"1x1 {n}, 1x7 {n}, 7x1 192"),
        ("tower_1/", f"1x1 {n}, 7x1 {n}, 1x7 {n}, 7x1 {n}, 1x7 192"),
        ("tower_2/", "avg, 1x1 192"),
    ]


def _block_8(pool: str) -> list[tuple[str, str]]:
    return [
        ("", "1x1 320"),
        ("tower/", "1x1 384, 1x3 384 | 3x1 384"),
        ("tower_1/", "1x1 448, 3x3 384, 1x3 384 | 3x1 384"),
        ("tower_2/", f"{pool}, 1x1 192"),
    ]


# A block's branches, each with its name and its chain from the block's input, in the order of the
# join.
BLOCKS = {
    "mixed": _block_35(32),
    "mixed_1": _block_35(64),
    "mixed_2": _block_35(64),
    "mixed_3": [("", "3x3/2 384"), ("tower/", "1x1 64, 3x3 96, 3x3/2 96"), ("", "max/2")],
    "mixed_4": _block_17(128),
    "mixed_5": _block_17(160),
    "mixed_6": _block_17(160),
    "mixed_7": _block_17(192),
    "mixed_8": [
        ("tower/", "1x1 192, 3x3/2 320"),
        ("tower_1/", "1x1 192, 1x7 192, 7x1 192, 3x3/2 192"),
        ("", "max/2"),
    ],
    "mixed_9": _block_8("avg"),
    "mixed_10": _block_8("max"),
}

INPUT = "Mul"  # the resized and scaled image, 3 channels
SPATIAL = "mixed_6/conv"  # its first 7 channels, 17 x 17 pixels, are sFID's features
SPATIAL_CHANNELS = 7
OUTPUT = "mixed_10/join"  # its mean over 8 x 8 pixels is the 2048 pool features
FEATURES, CLASSES = 2048, 1008
BATCH_NORM_EPSILON = 0.001


def _build() -> tuple[Node, ...]:
    nodes: list[Node] = []
    channels = {INPUT: 3}

    def add_step(step: str, prefix: str, source: str, names: Counter) -> str:
        kernel, _, width = step.partition(" ")
        strided, valid = kernel.endswith("/2"), kernel.endswith(("/2", "v"))
        kernel = kernel.removesuffix("/2").removesuffix("v")
        kind = "pool" if kernel in ("max", "avg") else "conv"
        name = prefix + kind + (f"_{names[kind]}" if names[kind] else "")
        names[kind] += 1
        stride, padding = 2 if strided else 1, "VALID" if valid else "SAME"
        if kind == "pool":
            nodes.append(
                Pool(name, source, "MaxPool" if kernel == "max" else "AvgPool", stride, padding)
            )
            channels[name] = channels[source]
        else:
            size = tuple(int(side) for side in kernel.split("x"))
            nodes.append(Unit(name, source, size, channels[source], int(width), stride, padding))
            channels[name] = int(width)
        return name

    def add_chain(chain: str, prefix: str, source: str) -> list[str]:
        ends, names = [source], Counter()
        for step in chain.split(", "):
            parts = step.split(" | ")
            if len(parts) > 1:
                prefix, names = prefix + "mixed/", Counter()
            ends = [add_step(part, prefix, ends[0], names) for part in parts]
        return ends

    [source] = add_chain(STEM, "", INPUT)
    for block, branches in BLOCKS.items():
        ends = [
            end
            for branch, chain in branches
            for end in add_chain(chain, f"{block}/{branch}", source)
        ]
        source = f"{block}/join"
        nodes.append(Join(source, tuple(ends)))
        channels[source] = sum(channels[end] for end in ends)
    return tuple(nodes)


GRAPH = _build()
UNITS = tuple(node for node in GRAPH if isinstance(node, Unit))
