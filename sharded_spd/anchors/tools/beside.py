"""What belongs to a checkpoint beside its weights: configuration, tokenizer, code, licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sharded_spd.anchors.checkpoint import INDEX, Checkpoint
from sharded_spd.anchors.manifest import MANIFEST
from sharded_spd.errors import AnchorError

RECORD = "interpolation.json"
"""In a folder that was made from two checkpoints: which ones."""
_ENDINGS = (
    ".json", ".txt", ".model", ".jinja", ".md", ".py", ".yaml", ".yml", ".tiktoken", ".spm", ".bpe", ".vocab",
    ".codes",
)  # fmt: skip
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".ggml", ".npz", ".npy", ".pkl", ".pickle", ".ot", ".tflite", ".mlmodel",
)  # fmt: skip
# They would be false beside new weights, as would an index of others.
_UNTRUE = (MANIFEST, RECORD, "scores.json")
_OTHER_INDEX = ".index.json"


@dataclass(frozen=True, slots=True)
class Companions:
    """`taken`: paths below the checkpoint's directory that belong to it; `left`: what else lies there."""

    taken: tuple[str, ...]
    left: tuple[str, ...]


def companions(checkpoint: Checkpoint) -> Companions:
    """The files beside a checkpoint's weights, and its index: of the kinds that such directories have.

    Also those in sub-folders that hold neither weights nor folders (`1_Pooling/config.json`). Of a lone file
    only where a config.json says that its directory is a checkpoint's.

    Raises:
        AnchorError: the directory cannot be read.
    """
    folder, root = checkpoint.folder, checkpoint.root
    try:
        weights = {checkpoint.relative(path) for path in checkpoint.files().values()}
        alone = root.is_file() and not root.name.endswith(".json") and not (folder / "config.json").is_file()
        taken: list[str] = []
        left: list[str] = []
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                inside = [] if alone else _of_folder(path)
                taken += [f"{path.name}/{name}" for name in inside]
                if not inside and not any(name.startswith(f"{path.name}/") for name in weights):
                    left.append(f"{path.name}/")
            elif path.name not in weights:
                own_index = path.name.endswith(INDEX) and (root.is_dir() or path == root)
                belongs = own_index or (not alone and _belongs(path))
                (taken if belongs else left).append(path.name)
    except OSError as error:
        raise AnchorError(f"{folder}: cannot be read: {error.strerror}") from None
    found = [name for name in taken if name not in weights]
    return Companions(tuple(found), tuple(sorted(left, key=lambda name: (name.startswith("."), name))))


def _belongs(path: Path) -> bool:
    name = path.name
    known = name.endswith(_ENDINGS) or name.startswith(_LEGAL)
    other = name.startswith(".") or name in _UNTRUE or name.endswith((*_WEIGHTS, _OTHER_INDEX))
    return known and not other and path.is_file()


def _of_folder(folder: Path) -> list[str]:
    """What belongs to the checkpoint in a folder of it; nothing where that is a model or a tree itself."""
    if folder.name.startswith((".", "__")) or folder.is_symlink():
        return []
    try:
        paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__"))]
    except OSError:  # not ours to read, so no part of what is
        return []
    if any(path.is_dir() or path.name.endswith(_WEIGHTS) for path in paths):
        return []
    return [path.name for path in paths if _belongs(path)]
