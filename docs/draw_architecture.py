"""Draws docs/architecture.svg from the code: `python docs/draw_architecture.py`.

Folders stand on the stairs in the order of import-linter's contract, so every import lies right of them; the
path of a step is `STEP`, which a test follows through a step that is really taken.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sharded_spd"
TARGET = ROOT / "docs" / "architecture.svg"

STEP = [
    ("optim", "step", "the gradients are there"),
    ("projection", "before_step", "opens the step"),
    ("engines", "bind", "which slices of which layers this rank holds"),
    ("kernels", "sums", "of ⟨g, d⟩ and |d|², d = w - w0, on this rank"),
    ("optim", "_step_base", "Adam, from w to w~"),
    ("projection", "after_step", "closes it, for all layers at once"),
    ("kernels", "sums", "of |w~ - w0|², on this rank"),
    ("projection", "reduce_together_", "one all-reduce per scope"),
    ("rules", "pull", "the pull s of each layer, from the sums"),
    ("kernels", "pull_", "w = w~ - s (w~ - w0)"),
]
"""The folders that a step of AdamSPD comes through in turn: a function there, and what happens."""

WIDTH, LEFT, TOP, RIGHT = 900, 16, 62, 12
BOX_WIDTH, BOX_HEIGHT, PORT = 108, 25, 84
ROW, COLUMN, STATION = 35, 41, 31

STYLE = """
text { font-family: 'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif; font-size: 12px; fill: #24303f }
.band { fill: #f3f5f8 }
.box { fill: #e6ecf5; stroke: #5f7ba3 }
.box.path { fill: #ffefd5; stroke: #cc7a00 }
.name { text-anchor: middle; font-weight: bold }
.import { fill: none; stroke: #9db0c9; stroke-width: 1.2 }
.dot, .head { fill: #46628c }
.lane { stroke: #e3a857; stroke-width: 1; stroke-dasharray: 2 4 }
.step { fill: none; stroke: #cc5200; stroke-width: 2; stroke-linejoin: round }
.station { fill: #cc5200 }
.number { fill: #ffffff; font-size: 10px; font-weight: bold; text-anchor: middle }
.heading { font-weight: bold; font-size: 13px }
.code { font-weight: bold }
"""


def read_layers() -> list[list[str]]:
    """The folders, layer by layer from the top, of the contract "one-way" in pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts: list[dict[str, Any]] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    contract = next(c for c in contracts if c["id"] == "one-way")
    return [layer.replace("|", ":").replace(" ", "").split(":") for layer in contract["layers"]]


def read_imports() -> set[tuple[str, str]]:
    """(importer, imported) between the folders of the layers."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    folders = {name for layer in read_layers() for name in layer}
    pairs = {
        (importer.split(".")[1], imported.split(".")[1])
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if importer != PACKAGE and imported != PACKAGE
    }
    return {(a, b) for a, b in pairs if a != b and {a, b} <= folders}


def draw() -> str:
    """The picture as SVG, the same bytes for the same code."""
    layers, imports = read_layers(), sorted(read_imports())
    order = [name for layer in layers for name in layer]
    stairs = WIDTH - RIGHT - BOX_WIDTH - COLUMN * (len(order) - 1)
    place = {name: (stairs + COLUMN * i, TOP + ROW * i) for i, name in enumerate(order)}
    bottom = TOP + ROW * len(order)
    height = bottom + 20 * ((len(STEP) + 1) // 2) + 14
    told = "; ".join(
        f"{name} imports {', '.join(b for a, b in imports if a == name)}"
        for name in order
        if any(a == name for a, _ in imports)
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img">',
            f"<title>The folders of {PACKAGE}, who imports whom, and the path of one step</title>",
            f"<desc>{told}.</desc>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *_bands(layers),
            *_arrows(imports, place),
            *_path(place),
            *_boxes(place),
            *_words(stairs, bottom),
            "</svg>\n",
        ]
    )


def _bands(layers: list[list[str]]) -> list[str]:
    """A stripe behind every other layer."""
    parts, row = [], 0
    for number, layer in enumerate(layers):
        if number % 2 == 0:
            y = TOP + ROW * row - ROW / 2
            parts.append(f'<rect class="band" y="{y:g}" width="{WIDTH}" height="{ROW * len(layer)}"/>')
        row += len(layer)
    return parts


def _arrows(imports: list[tuple[str, str]], place: dict[str, tuple[int, int]]) -> list[str]:
    """A line along each importer's row and one down each imported column, with a dot where they belong."""
    lines, dots = [], []
    for name, (x, y) in place.items():
        columns = [place[b][0] + PORT for a, b in imports if a == name]
        if columns:
            lines.append(f'<path class="import" d="M{x + BOX_WIDTH} {y}H{max(columns)}"/>')
        rows = [place[a][1] for a, b in imports if b == name]
        if rows:
            port, end = x + PORT, y - BOX_HEIGHT / 2
            lines.append(f'<path class="import" d="M{port} {min(rows)}V{end - 4:g}"/>')
            dots.append(f'<path class="head" d="M{port} {end:g}l-3.5 -7h7z"/>')
    for a, b in imports:
        dots.append(f'<circle class="dot" cx="{place[b][0] + PORT}" cy="{place[a][1]}" r="3.2"/>')
    return lines + dots


def _number(x: int, y: int, number: int, radius: int) -> str:
    """A station: its number in a circle."""
    circle = f'<circle class="station" cx="{x}" cy="{y}" r="{radius}"/>'
    return f'{circle}<text class="number" x="{x}" y="{y + 4}">{number}</text>'


def _path(place: dict[str, tuple[int, int]]) -> list[str]:
    """The stations of a step, one column each, on the rows of their folders."""
    points = [(LEFT + 8 + STATION * i, place[folder][1]) for i, (folder, _, _) in enumerate(STEP)]
    lanes = []
    for folder in dict.fromkeys(folder for folder, _, _ in STEP):
        first = next(x for (x, _), (name, _, _) in zip(points, STEP, strict=True) if name == folder)
        x, y = place[folder]
        lanes.append(f'<line class="lane" x1="{first}" y1="{y}" x2="{x}" y2="{y}"/>')
    (x, y), *rest = points
    route = f"M{x} {y}" + "".join(f"H{x}V{y}" for x, y in rest)
    stations = [_number(x, y, i, 9) for i, (x, y) in enumerate(points, 1)]
    return [*lanes, f'<path class="step" d="{route}"/>', *stations]


def _boxes(place: dict[str, tuple[int, int]]) -> list[str]:
    on_path = {folder for folder, _, _ in STEP}
    return [
        f'<rect class="box{" path" if name in on_path else ""}" x="{x}" y="{y - BOX_HEIGHT / 2:g}" '
        f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4"/>'
        f'<text class="name" x="{x + BOX_WIDTH / 2:g}" y="{y + 4}">{name}</text>'
        for name, (x, y) in place.items()
    ]


def _words(stairs: int, bottom: int) -> list[str]:
    """What the dots say above the stairs, what the numbers say below them."""
    half = (len(STEP) + 1) // 2
    lines = [
        _heading(LEFT, "One step of AdamSPD", f"left to right, 1 to {len(STEP)}"),
        _heading(
            stairs + 150,
            "Imports run one way",
            "a dot: the folder in its row imports the one in its column; a stripe: a layer",
        ),
    ]
    for i, (folder, function, words) in enumerate(STEP):
        x, y = (LEFT + 9, 470)[i // half], bottom + 4 + 20 * (i % half)
        code = f'<tspan class="code">{folder}: {function}</tspan>'
        lines += [_number(x, y, i + 1, 8), f'<text x="{x + 16}" y="{y + 4}">{code}&#160; {words}</text>']
    return lines


def _heading(x: int, title: str, words: str) -> str:
    return f'<text class="heading" x="{x}" y="24">{title}</text><text x="{x}" y="40">{words}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
