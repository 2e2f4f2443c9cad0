"""Which file holds which tensor of a safetensors checkpoint: a file, a sharded index, or a directory."""

from __future__ import annotations

import os
from pathlib import Path

from sharded_spd.anchors.hub import find_local
from sharded_spd.anchors.manifest import MANIFEST, Manifest, read_manifest
from sharded_spd.anchors.paths import leads_out, some
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import StoredTensor, load_json, read_header

INDEX = ".safetensors.index.json"


class Checkpoint:
    """The tensors of a checkpoint by name, and the manifest beside them. Reads lazily.

    Results are cached, errors are not: the next call tries again. No file stays open.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._root: Path | None = None
        self._files: dict[str, str] | None = None
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._manifest: tuple[Manifest | None] | None = None

    @property
    def root(self) -> Path:
        """The checkpoint's path on this machine; for a name of the hub, in its local cache.

        Raises:
            AnchorError: there is no such path, and no such name in the cache.
        """
        if self._root is None:
            self._root = find_local(self.source)
        return self._root

    @property
    def folder(self) -> Path:
        """The directory that its files lie in or below."""
        return self.root if self.root.is_dir() else self.root.parent

    def files(self) -> dict[str, str]:
        """The path of the file of each tensor, by the tensor's name.

        Raises:
            AnchorError: nothing is there, it could mean several checkpoints, or a file or index is damaged.
        """
        if self._files is None:
            try:
                self._files = self._locate(self.root)
            except OSError as error:
                raise AnchorError(f"{self.root}: cannot be read: {error.strerror}") from None
        return self._files

    def tensor(self, key: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            AnchorError: its file is damaged, or lacks a tensor that the index lists.
        """
        path = self.files()[key]
        header = self.header(path)
        if key not in header:
            raise AnchorError(f"{path}: lacks tensor {key!r}, which the index of {self.source} says it holds")
        return header[key]

    def header(self, path: str) -> dict[str, StoredTensor]:
        """All tensors of one file."""
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]

    def relative(self, path: str) -> str:
        """A file's name in the manifest: its path below the checkpoint's directory, with slashes."""
        return Path(path).relative_to(self.folder).as_posix()

    def manifest(self) -> Manifest | None:
        """The manifest beside the files; None if there is none, or if it does not list the one file named.

        Raises:
            AnchorError: the manifest is damaged.
        """
        if self._manifest is None:
            path, found = self.folder / MANIFEST, None
            if path.exists():
                found = read_manifest(path)
                if self.root.is_file() and not any(self.relative(f) in found.files for f in self._named()):
                    found = None
            self._manifest = (found,)
        return self._manifest[0]

    def fault(self, tensor: StoredTensor) -> tuple[str | None, str | None]:
        """By the manifest, if there is one: how the tensor's file, or the tensor, differs from it.

        Raises:
            AnchorError: the file cannot be read.
        """
        manifest = self.manifest()
        if manifest is None:
            return None, None
        file = manifest.file_fault(tensor.path, self.relative(tensor.path), tensor.file_bytes)
        return file, None if file else manifest.tensor_fault(tensor)

    def _named(self) -> set[str]:
        """The files that the given path means, if it is a file itself."""
        is_index = self.root.name.endswith(".json")
        return set(self.files().values()) if is_index else {str(self.root)}

    def _locate(self, root: Path) -> dict[str, str]:
        if root.is_dir():
            indices = sorted(root.glob("*" + INDEX))
            if len(indices) > 1:
                names = some([path.name for path in indices])
                raise AnchorError(f"{root}: holds several indices ({names}); name one of them")
            return _read_index(indices[0]) if indices else self._unite(root)
        if root.name.endswith(".json"):
            return _read_index(root)
        return dict.fromkeys(self.header(str(root)), str(root))

    def _unite(self, root: Path) -> dict[str, str]:
        """List the tensors of all files in a directory without an index; their names must be distinct."""
        paths = sorted(root.glob("*.safetensors"))
        if not paths:
            others = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {some(others)} would have to be unpickled: save as safetensors" if others else ""
            raise AnchorError(f"{root}: holds no *.safetensors and no *{INDEX}{hint}")
        files: dict[str, str] = {}
        for path in paths:
            for key in self.header(str(path)):
                if key in files:
                    both = f"{Path(files[key]).name} and {path.name}"
                    raise AnchorError(f"{root}: {both} both hold {key!r}; name one file or its index")
                files[key] = str(path)
        return files


def _read_index(path: Path) -> dict[str, str]:
    """Read the file of each tensor from an index, which may name only files beside or below it."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise AnchorError(f"{path}: cannot be read: {error.strerror}") from None
    files = load_json(text, f"{path}: not a valid index").get("weight_map")
    if not isinstance(files, dict):
        wanted = "a weight_map of tensor to file"
        raise AnchorError(f"{path}: not a valid index: wanted {wanted}, got {files!r:.100}")
    for key, name in files.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise AnchorError(f"{path}: tensor {key!r}: wanted a file name, got {name!r:.100}")
        if leads_out(name):
            raise AnchorError(f"{path}: tensor {key!r}: {name!r} leads out of the checkpoint's directory")
    return {key: os.fspath(path.parent / name) for key, name in files.items()}
