"""A GraphDef like ``classify_image_graph_def.pb``, node for node, with random weights.

It is made without TensorFlow. The nodes are written out here and not derived from the table in
``edt.metrics``, so that the two check one another. The result has the size of the published file,
to which every name and attribute contributes.
"""

import struct
from typing import Literal

import numpy as np

# Convolution units: name, input, kernel height, width, channels in, channels out, stride, padding.
UNITS = """
conv Mul 3,3,3,32 2 VALID
conv_1 conv 3,3,32,32 1 VALID
conv_2 conv_1 3,3,32,64 1 SAME
conv_3 pool 1,1,64,80 1 VALID
conv_4 conv_3 3,3,80,192 1 VALID
mixed/conv pool_1 1,1,192,64 1 SAME
mixed/tower/conv pool_1 1,1,192,48 1 SAME
mixed/tower/conv_1 mixed/tower/conv 5,5,48,64 1 SAME
mixed/tower_1/conv pool_1 1,1,192,64 1 SAME
mixed/tower_1/conv_1 mixed/tower_1/conv 3,3,64,96 1 SAME
mixed/tower_1/conv_2 mixed/tower_1/conv_1 3,3,96,96 1 SAME
mixed/tower_2/conv mixed/tower_2/pool 1,1,192,32 1 SAME
mixed_1/conv mixed/join 1,1,256,64 1 SAME
mixed_1/tower/conv mixed/join 1,1,256,48 1 SAME
mixed_1/tower/conv_1 mixed_1/tower/conv 5,5,48,64 1 SAME
mixed_1/tower_1/conv mixed/join 1,1,256,64 1 SAME
mixed_1/tower_1/conv_1 mixed_1/tower_1/conv 3,3,64,96 1 SAME
mixed_1/tower_1/conv_2 mixed_1/tower_1/conv_1 3,3,96,96 1 SAME
mixed_1/tower_2/conv mixed_1/tower_2/pool 1,1,256,64 1 SAME
mixed_2/conv mixed_1/join 1,1,288,64 1 SAME
mixed_2/tower/conv mixed_1/join 1,1,288,48 1 SAME
mixed_2/tower/conv_1 mixed_2/tower/conv 5,5,48,64 1 SAME
mixed_2/tower_1/conv mixed_1/join 1,1,288,64 1 SAME
mixed_2/tower_1/conv_1 mixed_2/tower_1/conv 3,3,64,96 1 SAME
mixed_2/tower_1/conv_2 mixed_2/tower_1/conv_1 3,3,96,96 1 SAME
mixed_2/tower_2/conv mixed_2/tower_2/pool 1,1,288,64 1 SAME
mixed_3/conv mixed_2/join 3,3,288,384 2 VALID
mixed_3/tower/conv mixed_2/join 1,1,288,64 1 SAME
mixed_3/tower/conv_1 mixed_3/tower/conv 3,3,64,96 1 SAME
mixed_3/tower/conv_2 mixed_3/tower/conv_1 3,3,96,96 2 VALID
mixed_4/conv mixed_3/join 1,1,768,192 1 SAME
mixed_4/tower/conv mixed_3/join 1,1,768,128 1 SAME
mixed_4/tower/conv_1 mixed_4/tower/conv 1,7,128,128 1 SAME
mixed_4/tower/conv_2 mixed_4/tower/conv_1 7,1,128,192 1 SAME
mixed_4/tower_1/conv mixed_3/join 1,1,768,128 1 SAME
mixed_4/tower_1/conv_1 mixed_4/tower_1/conv 7,1,128,128 1 SAME
mixed_4/tower_1/conv_2 mixed_4/tower_1/conv_1 1,7,128,128 1 SAME
mixed_4/tower_1/conv_3 mixed_4/tower_1/conv_2 7,1,128,128 1 SAME
mixed_4/tower_1/conv_4 mixed_4/tower_1/conv_3 1,7,128,192 1 SAME
mixed_4/tower_2/conv mixed_4/tower_2/pool 1,1,768,192 1 SAME
mixed_5/conv mixed_4/join 1,1,768,192 1 SAME
mixed_5/tower/conv mixed_4/join 1,1,768,160 1 SAME
mixed_5/tower/conv_1 mixed_5/tower/conv 1,7,160,160 1 SAME
mixed_5/tower/conv_2 mixed_5/tower/conv_1 7,1,160,192 1 SAME
mixed_5/tower_1/conv mixed_4/join 1,1,768,160 1 SAME
mixed_5/tower_1/conv_1 mixed_5/tower_1/conv 7,1,160,160 1 SAME
mixed_5/tower_1/conv_2 mixed_5/tower_1/conv_1 1,7,160,160 1 SAME
mixed_5/tower_1/conv_3 mixed_5/tower_1/conv_2 7,1,160,160 1 SAME
mixed_5/tower_1/conv_4 mixed_5/tower_1/conv_3 1,7,160,192 1 SAME
mixed_5/tower_2/conv mixed_5/tower_2/pool 1,1,768,192 1 SAME
mixed_6/conv mixed_5/join 1,1,768,192 1 SAME
mixed_6/tower/conv mixed_5/join 1,1,768,160 1 SAME
mixed_6/tower/conv_1 mixed_6/tower/conv 1,7,160,160 1 SAME
mixed_6/tower/conv_2 mixed_6/tower/conv_1 7,1,160,192 1 SAME
mixed_6/tower_1/conv mixed_5/join 1,1,768,160 1 SAME
mixed_6/tower_1/conv_1 mixed_6/tower_1/conv 7,1,160,160 1 SAME
mixed_6/tower_1/conv_2 mixed_6/tower_1/conv_1 1,7,160,160 1 SAME
mixed_6/tower_1/conv_3 mixed_6/tower_1/conv_2 7,1,160,160 1 SAME
mixed_6/tower_1/conv_4 mixed_6/tower_1/conv_3 1,7,160,192 1 SAME
mixed_6/tower_2/conv mixed_6/tower_2/pool 1,1,768,192 1 SAME
mixed_7/conv mixed_6/join 1,1,768,192 1 SAME
mixed_7/tower/conv mixed_6/join 1,1,768,192 1 SAME
mixed_7/tower/conv_1 mixed_7/tower/conv 1,7,192,192 1 SAME
mixed_7/tower/conv_2 mixed_7/tower/conv_1 7,1,192,192 1 SAME
mixed_7/tower_1/conv mixed_6/join 1,1,768,192 1 SAME
mixed_7/tower_1/conv_1 mixed_7/tower_1/conv 7,1,192,192 1 SAME
mixed_7/tower_1/conv_2 mixed_7/tower_1/conv_1 1,7,192,192 1 SAME
mixed_7/tower_1/conv_3 mixed_7/tower_1/conv_2 7,1,192,192 1 SAME
mixed_7/tower_1/conv_4 mixed_7/tower_1/conv_3 1,7,192,192 1 SAME
mixed_7/tower_2/conv mixed_7/tower_2/pool 1,1,768,192 1 SAME
mixed_8/tower/conv mixed_7/join 1,1,768,192 1 SAME
mixed_8/tower/conv_1 mixed_8/tower/conv 3,3,192,320 2 VALID
mixed_8/tower_1/conv mixed_7/join 1,1,768,192 1 SAME
mixed_8/tower_1/conv_1 mixed_8/tower_1/conv 1,7,192,192 1 SAME
mixed_8/tower_1/conv_2 mixed_8/tower_1/conv_1 7,1,192,192 1 SAME
mixed_8/tower_1/conv_3 mixed_8/tower_1/conv_2 3,3,192,192 2 VALID
mixed_9/conv mixed_8/join 1,1,1280,320 1 SAME
mixed_9/tower/conv mixed_8/join 1,1,1280,384 1 SAME
mixed_9/tower/mixed/conv mixed_9/tower/conv 1,3,384,384 1 SAME
mixed_9/tower/mixed/conv_1 mixed_9/tower/conv 3,1,384,384 1 SAME
mixed_9/tower_1/conv mixed_8/join 1,1,1280,448 1 SAME
mixed_9/tower_1/conv_1 mixed_9/tower_1/conv 3,3,448,384 1 SAME
mixed_9/tower_1/mixed/conv mixed_9/tower_1/conv_1 1,3,384,384 1 SAME
mixed_9/tower_1/mixed/conv_1 mixed_9/tower_1/conv_1 3,1,384,384 1 SAME
mixed_9/tower_2/conv mixed_9/tower_2/pool 1,1,1280,192 1 SAME
mixed_10/conv mixed_9/join 1,1,2048,320 1 SAME
mixed_10/tower/conv mixed_9/join 1,1,2048,384 1 SAME
mixed_10/tower/mixed/conv mixed_10/tower/conv 1,3,384,384 1 SAME
mixed_10/tower/mixed/conv_1 mixed_10/tower/conv 3,1,384,384 1 SAME
mixed_10/tower_1/conv mixed_9/join 1,1,2048,448 1 SAME
mixed_10/tower_1/conv_1 mixed_10/tower_1/conv 3,3,448,384 1 SAME
mixed_10/tower_1/mixed/conv mixed_10/tower_1/conv_1 1,3,384,384 1 SAME
mixed_10/tower_1/mixed/conv_1 mixed_10/tower_1/conv_1 3,1,384,384 1 SAME
mixed_10/tower_2/conv mixed_10/tower_2/pool 1,1,2048,192 1 SAME
"""
BLOCKS = ("mixed", *(f"mixed_{i}" for i in range(1, 11)))
INPUTS = dict(zip(BLOCKS, ("pool_1", *(f"{block}/join" for block in BLOCKS)), strict=False))
MAX_POOLS = {  # name: input, stride, padding
    "pool": ("conv_2", 2, "VALID"),
    "pool_1": ("conv_4", 2, "VALID"),
    "mixed_3/pool": ("mixed_2/join", 2, "VALID"),
    "mixed_8/pool": ("mixed_7/join", 2, "VALID"),
    "mixed_10/tower_2/pool": ("mixed_9/join", 1, "SAME"),
}
AVERAGE_POOLS = [block for block in BLOCKS if block not in ("mixed_3", "mixed_8", "mixed_10")]
BRANCHES_35 = "conv tower/conv_1 tower_1/conv_2 tower_2/conv"
BRANCHES_17 = "conv tower/conv_2 tower_1/conv_4 tower_2/conv"
BRANCHES_8 = (
    "conv tower/mixed/conv tower/mixed/conv_1 tower_1/mixed/conv tower_1/mixed/conv_1 tower_2/conv"
)
JOINS = {
    **dict.fromkeys(("mixed", "mixed_1", "mixed_2"), BRANCHES_35),
    "mixed_3": "conv tower/conv_2 pool",
    **dict.fromkeys(("mixed_4", "mixed_5", "mixed_6", "mixed_7"), BRANCHES_17),
    "mixed_8": "tower/conv_1 tower_1/conv_3 pool",
    **dict.fromkeys(("mixed_9", "mixed_10"), BRANCHES_8),
}
FLOAT, UINT8, INT32, STRING = 1, 4, 3, 7  # TensorFlow's data types
Gamma = Literal["one", "ignored", "used"]  # random when ignored or used
PUBLISHED_BYTES = 95_673_916


def varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def text(field: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(value)) + value


def single(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def kind(value: int) -> bytes:
    return number(6, value)


def flag(value: bool) -> bytes:
    return number(5, int(value))


def integers(*values: int) -> bytes:
    return text(1, text(3, b"".join(map(varint, values))))


def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
    entries = (text(5, text(1, key) + text(2, value)) for key, value in attributes.items())
    return text(
        1,
        text(1, name)
        + text(2, op)
        + b"".join(text(3, source) for source in inputs)
        + b"".join(entries),
    )


def constant(name: str, value: np.ndarray | bytes | int | float) -> bytes:
    """Arrays go to ``tensor_content``, scalars to the field of their type, as in the published
    file.
    """
    if isinstance(value, bytes):
        dtype, shape, content = STRING, b"", text(8, value)
    elif isinstance(value, int):
        dtype, shape, content = INT32, b"", text(7, varint(value))
    elif isinstance(value, float):
        dtype, shape, content = FLOAT, b"", text(5, struct.pack("<f", value))
    else:
        dtype = FLOAT if value.dtype == np.float32 else INT32
        shape, content = (
            b"".join(text(2, number(1, size)) for size in value.shape),
            text(4, value.tobytes()),
        )
    return node(
        name, "Const", dtype=kind(dtype), value=text(8, number(1, dtype) + text(2, shape) + content)
    )


def guarded(name: str, source: str, message: str) -> bytes:
    check = node(
        f"{name}/CheckNumerics", "CheckNumerics", source, T=kind(FLOAT), message=text(2, message)
    )
    return check + node(
        f"{name}/control_dependency", "Identity", source, f"^{name}/CheckNumerics", T=kind(FLOAT)
    )


def input_path(side: int = 299) -> bytes:
    jpeg = node(
        "DecodeJpeg",
        "DecodeJpeg",
        "DecodeJpeg/contents",
        channels=number(3, 3),
        ratio=number(3, 1),
        fancy_upscaling=flag(True),
        try_recover_truncated=flag(False),
        acceptable_fraction=single(4, 1.0),
    )
    return b"".join(
        [
            constant("DecodeJpeg/contents", bytes(2683)),
            jpeg,
            node("Cast", "Cast", "DecodeJpeg", SrcT=kind(UINT8), DstT=kind(FLOAT)),
            constant("ExpandDims/dim", 0),
            node("ExpandDims", "ExpandDims", "Cast", "ExpandDims/dim", T=kind(FLOAT)),
            constant("ResizeBilinear/size", np.array([side, side], np.int32)),
            node(
                "ResizeBilinear",
                "ResizeBilinear",
                "ExpandDims",
                "ResizeBilinear/size",
                T=kind(FLOAT),
            ),
            constant("Sub/y", 128.0),
            node("Sub", "Sub", "ResizeBilinear", "Sub/y", T=kind(FLOAT)),
            constant("Mul/y", 1 / 128),
            node("Mul", "Mul", "Sub", "Mul/y", T=kind(FLOAT)),
        ]
    )


def unit(row: str, r: np.random.Generator, gamma: Gamma, epsilon: float) -> bytes:
    name, source, kernel, stride, padding = row.split()
    shape = tuple(map(int, kernel.split(",")))
    stride = int(stride)

    def normal(size, deviation: float) -> np.ndarray:
        return np.float32(deviation) * r.standard_normal(size, dtype=np.float32)

    cout = shape[3]
    gammas = r.uniform(0.5, 1.5, cout).astype(np.float32)
    gammas = np.ones_like(gammas) if gamma == "one" else gammas
    statistics = ("moving_mean", "moving_variance", "beta", "gamma")
    return b"".join(
        [
            constant(f"{name}/conv2d_params", normal(shape, (2 / np.prod(shape[:3])) ** 0.5)),
            node(
                f"{name}/Conv2D",
                "Conv2D",
                source,
                f"{name}/conv2d_params",
                T=kind(FLOAT),
                strides=integers(1, stride, stride, 1),
                padding=text(2, padding),
                use_cudnn_on_gpu=flag(True),
            ),
            constant(f"{name}/batchnorm/beta", normal(cout, 0.1)),
            constant(f"{name}/batchnorm/gamma", gammas),
            constant(f"{name}/batchnorm/moving_mean", normal(cout, 0.2)),
            constant(
                f"{name}/batchnorm/moving_variance", r.uniform(0.5, 1.5, cout).astype(np.float32)
            ),
            node(
                f"{name}/batchnorm",
                "BatchNormWithGlobalNormalization",
                f"{name}/Conv2D",
                *(f"{name}/batchnorm/{statistic}" for statistic in statistics),
                T=kind(FLOAT),
                variance_epsilon=single(4, epsilon),
                scale_after_normalization=flag(gamma == "used"),
            ),
            guarded(name, f"{name}/batchnorm", "activation input is not finite."),
            node(name, "Relu", f"{name}/control_dependency", T=kind(FLOAT)),
        ]
    )


def pools_and_joins(last_pool: str = "MaxPool") -> bytes:
    parts = []
    for name, (source, stride, padding) in MAX_POOLS.items():
        parts.append(guarded(name, source, "MaxPool input is not finite."))
        op = last_pool if name == "mixed_10/tower_2/pool" else "MaxPool"
        window = {"ksize": integers(1, 3, 3, 1), "strides": integers(1, stride, stride, 1)}
        parts.append(
            node(name, op, f"{name}/control_dependency", **window, padding=text(2, padding))
        )
    for block in AVERAGE_POOLS:
        window = {"ksize": integers(1, 3, 3, 1), "strides": integers(1, 1, 1, 1)}
        parts.append(
            node(
                f"{block}/tower_2/pool",
                "AvgPool",
                INPUTS[block],
                T=kind(FLOAT),
                **window,
                padding=text(2, "SAME"),
            )
        )
    for block, ends in JOINS.items():
        sources = [f"{block}/{end}" for end in ends.split()]
        axis = f"{block}/join/concat_dim"
        parts.append(constant(axis, 3))
        parts.append(
            node(
                f"{block}/join", "Concat", axis, *sources, N=number(3, len(sources)), T=kind(FLOAT)
            )
        )
    return b"".join(parts)


def head(r: np.random.Generator) -> bytes:
    weights = np.float32(2048**-0.5) * r.standard_normal((2048, 1008), dtype=np.float32)
    window = {"ksize": integers(1, 8, 8, 1), "strides": integers(1, 1, 1, 1)}
    transposes = {"transpose_a": flag(False), "transpose_b": flag(False)}
    return b"".join(
        [
            node(
                "pool_3",
                "AvgPool",
                "mixed_10/join",
                T=kind(FLOAT),
                **window,
                padding=text(2, "VALID"),
            ),
            constant("pool_3/_reshape/shape", np.array([1, 2048], np.int32)),
            node("pool_3/_reshape", "Reshape", "pool_3", "pool_3/_reshape/shape", T=kind(FLOAT)),
            constant("softmax/weights", weights),
            constant("softmax/biases", np.float32(0.1) * r.standard_normal(1008, dtype=np.float32)),
            node(
                "softmax/logits/MatMul",
                "MatMul",
                "pool_3/_reshape",
                "softmax/weights",
                T=kind(FLOAT),
                **transposes,
            ),
            node(
                "softmax/logits",
                "BiasAdd",
                "softmax/logits/MatMul",
                "softmax/biases",
                T=kind(FLOAT),
            ),
            node("softmax", "Softmax", "softmax/logits", T=kind(FLOAT)),
        ]
    )


def random_graph(
    seed: int,
    *,
    gamma: Gamma = "one",
    side: int = 299,
    epsilon: float = 0.001,
    last_pool: str = "MaxPool",
) -> bytes:
    """The serialized graph.

    Args:
        seed: of the random weights.
        gamma: whether the batch norms have other factors than one, and use them.
        side, epsilon, last_pool: values other than the default make a graph that must be refused.
    """
    r = np.random.default_rng(seed)
    units = [unit(row, r, gamma, epsilon) for row in UNITS.strip().splitlines()]
    # Producer 1 is the version of the published file's date. TensorFlow refuses these batch norms
    # from producer 9 on.
    versions = text(4, number(1, 1))
    return b"".join([input_path(side), *units, pools_and_joins(last_pool), head(r), versions])
