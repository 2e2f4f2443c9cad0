"""Where pre-trained values come from: tensors at hand, zero, or a safetensors checkpoint."""

from sharded_spd.anchors.base import AnchorStore, Values
from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.mapped import MappedAnchor, MappedValues
from sharded_spd.anchors.memory import TensorAnchor, ZeroAnchor

__all__ = [
    "AnchorStore",
    "FileAnchor",
    "MappedAnchor",
    "MappedValues",
    "TensorAnchor",
    "Values",
    "ZeroAnchor",
]
