"""What is measured: plain data, so that the command itself need not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass

SPD = ("adamspd_fused", "attach_fused", "adamspd_reference", "naive_dtensor", "published")
"""Variants that project."""
VARIANTS = ("adamw_fused", "copy", "adamw_foreach", *SPD, "adamspd_graph")
"""All; the first two are what the others are compared with."""
BASELINES = VARIANTS[:2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`series`: what this case varies; `pulled`: the fraction of layers; `seconds`: of measuring."""

    series: str = "default"
    shape: str = "vit"
    parameters: int = 43_115_520
    layers: int = 74
    ranks: int = 1
    threads: int = 2
    dtype: str = "float32"
    anchor_dtype: str = "float32"
    anchor_place: str = "weights"
    pulled: float = 0.2
    device: str = "cpu"
    variants: tuple[str, ...] = VARIANTS
    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 100

    @property
    def item_bytes(self) -> int:
        """Of a weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def anchor_bytes(self) -> int:
        """Of an anchor's element."""
        return 4 if self.anchor_dtype == "float32" else 2

    @property
    def title(self) -> str:
        """What a reader has to know of it."""
        place = "" if self.anchor_place == "weights" else f" on {self.anchor_place}"
        return (
            f"{self.parameters / 1e6:.1f} M {self.dtype} parameters in {self.layers} tensors, "
            f"{self.ranks} rank(s) x {self.threads} thread(s), anchor {self.anchor_dtype}{place}, "
            f"{self.pulled:.0%} of layers pulled"
        )


def least_bytes(variant: str, case: Case, pulled_elements: float) -> float | None:
    """Bytes per parameter that the algorithm has to move; None where that is not the point.

    AdamW reads w, g, m, v and writes w, m, v: 7 items. AdamSPD fused reads the anchor w0 too; a pulled layer
    is read and written once more, with its anchor. Around another optimizer there is a pass over w, g, w0
    before it, and one over w, w0 after it.
    """
    w, a = case.item_bytes, case.anchor_bytes
    pull = pulled_elements * (2 * w + a)
    known = {
        "adamw_fused": 7.0 * w,
        "adamw_foreach": 7.0 * w,
        "copy": 7.0 * w,
        "adamspd_fused": 7 * w + a + pull,
        "adamspd_graph": 7 * w + a + pull,
        "attach_fused": 7 * w + (2 * w + a) + (w + a) + pull,
    }
    return known.get(variant)


def held_bytes(variant: str, case: Case) -> int:
    """Bytes per local parameter that a variant needs at its peak, about; to see what fits."""
    w, a = case.item_bytes, case.anchor_bytes
    if variant == "copy":
        return 0
    state = 3 * w + (a if variant in SPD or variant == "adamspd_graph" else 0)
    return state + (w if variant == "adamw_foreach" else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCase:
    """One rank of `world`, of a model split by `engine`: fsdp2, hsdp, or fsdp2+tp."""

    model: str = "llama-70b"
    engine: str = "fsdp2"
    world: int = 1024
    threads: int = 1
