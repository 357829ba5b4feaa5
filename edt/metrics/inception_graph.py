"""The 2015 Inception graph behind FID, as data.

:data:`GRAPH` lists convolutions, pools and joins (concatenations) in execution order. The names
are those of ``classify_image_graph_def.pb`` (archive inception-2015-12-05), whose weights are read
by name.
"""

from collections import Counter
from typing import Literal, NamedTuple

Padding = Literal["SAME", "VALID"]  # TensorFlow's names: keep the size, or pad nothing
PoolOp = Literal["MaxPool", "AvgPool"]


class Unit(NamedTuple):
    """Convolution, batch norm, ReLU."""

    name: str
    source: str
    kernel: tuple[int, int]  # (height, width)
    channels_in: int
    channels_out: int
    stride: int
    padding: Padding


class Pool(NamedTuple):
    """3 x 3 pooling. An average counts only the pixels inside the image."""

    name: str
    source: str
    op: PoolOp
    stride: int
    padding: Padding


class Join(NamedTuple):
    """Concatenation along the channels."""

    name: str
    sources: tuple[str, ...]


Node = Unit | Pool | Join

# A chain of steps, separated by commas. A step is a kernel (height x width) with its output
# channels, or "max" or "avg" for a pool. "/2" means stride 2 without padding, "v" stride 1 without
# padding. The two kernels around a "|" have the same input, and both are ends of the chain.
STEM = "3x3/2 32, 3x3v 32, 3x3 64, max/2, 1x1v 80, 3x3v 192, max/2"


def _block_35(pool_channels: int) -> list[tuple[str, str]]:
    """A block of 35 x 35 pixels. ``pool_channels`` follow its average pool."""
    return [
        ("", "1x1 64"),
        ("tower/", "1x1 48, 5x5 64"),
        ("tower_1/", "1x1 64, 3x3 96, 3x3 96"),
        ("tower_2/", f"avg, 1x1 {pool_channels}"),
    ]


def _block_17(inner: int) -> list[tuple[str, str]]:
    """A block of 17 x 17 pixels. ``inner`` is the number of channels inside its branches."""
    return [
        ("", "1x1 192"),
        ("tower/", f"1x1 {inner}, 1x7 {inner}, 7x1 192"),
        ("tower_1/", f"1x1 {inner}, 7x1 {inner}, 1x7 {inner}, 7x1 {inner}, 1x7 192"),
        ("tower_2/", "avg, 1x1 192"),
    ]


def _block_8(pool: str) -> list[tuple[str, str]]:
    """A block of 8 x 8 pixels. The two differ in their ``pool``, "avg" or "max"."""
    return [
        ("", "1x1 320"),
        ("tower/", "1x1 384, 1x3 384 | 3x1 384"),
        ("tower_1/", "1x1 448, 3x3 384, 1x3 384 | 3x1 384"),
        ("tower_2/", f"{pool}, 1x1 192"),
    ]


# The branches of a block, in the order in which its join concatenates them. A branch is a prefix of
# names, and a chain that starts at the block's input.
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
OUTPUT = "mixed_10/join"  # its mean over 8 x 8 pixels is the 2048 pool features
SPATIAL = "mixed_6/conv"  # its first channels, 17 x 17 pixels, are sFID's features
SPATIAL_CHANNELS = 7
FEATURES, SPATIAL_FEATURES, CLASSES = 2048, SPATIAL_CHANNELS * 17 * 17, 1008
BATCH_NORM_EPSILON = 0.001


class _GraphBuilder:
    """Turns the chains of steps above into nodes, with the names that the published graph has."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.channels = {INPUT: 3}  # node name -> its output channels

    def add_chain(self, chain: str, prefix: str, source: str) -> list[str]:
        """Add the steps of a chain that starts at ``source``; returns the names of its ends."""
        ends = [source]
        counts: Counter[str] = Counter()
        for step in chain.split(", "):
            parts = step.split(" | ")
            if len(parts) > 1:
                prefix, counts = prefix + "mixed/", Counter()
            ends = [self.add_step(part, prefix, ends[0], counts) for part in parts]
        return ends

    def add_step(self, step: str, prefix: str, source: str, counts: Counter[str]) -> str:
        """Add a convolution unit or a pool; returns its name.

        Args:
            step: as in the chains above.
            prefix: of the name.
            source: name of the node before.
            counts: how many units ("conv") and pools ("pool") have the prefix; updated.
        """
        size, _, channels = step.partition(" ")
        stride = 2 if size.endswith("/2") else 1
        padding: Padding = "VALID" if size.endswith(("/2", "v")) else "SAME"
        size = size.removesuffix("/2").removesuffix("v")
        kind = "pool" if size in ("max", "avg") else "conv"
        # TensorFlow numbers equal names from the second one on: conv, conv_1, conv_2.
        name = prefix + kind + (f"_{counts[kind]}" if counts[kind] else "")
        counts[kind] += 1
        if kind == "pool":
            op: PoolOp = "MaxPool" if size == "max" else "AvgPool"
            self.nodes.append(Pool(name, source, op, stride, padding))
            self.channels[name] = self.channels[source]
        else:
            height, width = map(int, size.split("x"))
            self.channels[name] = int(channels)
            self.nodes.append(
                Unit(
                    name,
                    source,
                    (height, width),
                    self.channels[source],
                    self.channels[name],
                    stride,
                    padding,
                )
            )
        return name

    def add_block(self, block: str, branches: list[tuple[str, str]], source: str) -> str:
        """Add the branches of a block, and their join; returns the join's name."""
        ends = []
        for branch, chain in branches:
            ends += self.add_chain(chain, f"{block}/{branch}", source)
        join = f"{block}/join"
        self.nodes.append(Join(join, tuple(ends)))
        self.channels[join] = sum(self.channels[end] for end in ends)
        return join


def _create_graph() -> tuple[Node, ...]:
    builder = _GraphBuilder()
    [source] = builder.add_chain(STEM, "", INPUT)
    for block, branches in BLOCKS.items():
        source = builder.add_block(block, branches, source)
    return tuple(builder.nodes)


GRAPH = _create_graph()
UNITS = tuple(node for node in GRAPH if isinstance(node, Unit))
