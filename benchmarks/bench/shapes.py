"""The layers of a case, as blocks of named shapes."""

from __future__ import annotations

from math import prod

Block = dict[str, tuple[int, ...]]

VIT_WIDTH, VIT_BLOCKS = 768, 6


def vit_blocks(width: int = VIT_WIDTH, blocks: int = VIT_BLOCKS) -> list[Block]:
    """A vision transformer's encoder and its patch embedding: 43.1 M parameters in 74 tensors."""
    one: Block = {
        "norm1_weight": (width,), "norm1_bias": (width,),
        "qkv_weight": (3 * width, width), "qkv_bias": (3 * width,),
        "proj_weight": (width, width), "proj_bias": (width,),
        "norm2_weight": (width,), "norm2_bias": (width,),
        "fc1_weight": (4 * width, width), "fc1_bias": (4 * width,),
        "fc2_weight": (width, 4 * width), "fc2_bias": (width,),
    }  # fmt: skip
    return [*[dict(one) for _ in range(blocks)], {"embed_weight": (width, width), "embed_bias": (width,)}]


def layered_blocks(parameters: int, layers: int) -> list[Block]:
    """`layers` tensors of about `parameters` elements in all: matrices, and after each a vector."""
    matrices = (layers + 1) // 2
    columns = 8
    while columns * columns * 4 <= parameters // matrices:
        columns *= 2
    rest = parameters - (layers - matrices) * columns
    rows, more = divmod(max(rest, matrices * columns) // columns, matrices)
    blocks: list[Block] = []
    for i in range(layers):
        if i % 12 == 0:
            blocks.append({})
        own = (columns,) if i % 2 else (rows + (i // 2 < more), columns)
        blocks[-1][f"layer{i % 12}"] = own
    return blocks


def make_blocks(shape: str, parameters: int, layers: int) -> list[Block]:
    """The blocks of a case; "vit" has a size of its own."""
    return vit_blocks() if shape == "vit" else layered_blocks(parameters, layers)


def size_of(blocks: list[Block]) -> tuple[int, int]:
    """Elements and tensors."""
    shapes = [shape for block in blocks for shape in block.values()]
    return sum(map(prod, shapes)), len(shapes)
