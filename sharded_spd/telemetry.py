"""What a run can see of its projections: plain numbers from device tensors, and JSON lines.

Imports nothing of this package: it is handed plain `{name: tensor}`.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def numbers_of(
    reports: Sequence[tuple[Sequence[str], Mapping[str, Tensor]]],
    norms: Mapping[str, float],
    frozen: Set[str] = frozenset(),
) -> dict[str, dict[str, float]]:
    """Each layer's numbers from the reports of one step; waits for the device once.

    Args:
        reports: for each rule, its layers' FQNs and `[num_layers]` tensors: "s" (NaN: the rule has none per
            layer, and the activation rate leaves them out), "nonfinite" and what the rule adds.
        norms: |w0| of each layer.
        frozen: layers that are left out, since only some engines have them in their optimizer.
    """
    flat = [t.double() for _, report in reports for t in report.values()]
    numbers = iter(torch.cat([t.to(flat[0].device) for t in flat]).tolist() if flat else [])
    layers: dict[str, dict[str, float]] = {}
    for fqns, report in reports:
        for name in report:
            for fqn in fqns:
                layers.setdefault(fqn, {})[name] = next(numbers)
    for fqn, own in layers.items():
        own["norm"] = norms.get(fqn, 0.0)
    return {fqn: own for fqn, own in layers.items() if fqn not in frozen}


def summarize(numbers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What `numbers_of` gave, of one rank or of several together, and the same of the whole model."""
    layers = {fqn: dict(own) for fqn, own in numbers.items()}
    nonfinite = [fqn for fqn, own in layers.items() if own.pop("nonfinite", 0.0)]
    norms = {fqn: own.pop("norm") for fqn, own in layers.items()}
    for fqn, own in layers.items():
        if math.isnan(own.get("deviation", 0.0)):  # it did not step
            del own["deviation"]
        if "deviation" in own and norms[fqn] > 0:
            own["deviation_rel"] = own["deviation"] / norms[fqn]
        if math.isnan(own["s"]):
            del own["s"]
    pulls = [own["s"] for own in layers.values() if "s" in own]
    rate = sum(s > 0 for s in pulls) / max(len(pulls), 1)
    summary: dict[str, Any] = {
        "num_layers": len(layers),
        "activation_rate": rate if pulls or not layers else math.nan,
        "pulls_above_one": sum(s > 1 for s in pulls),
        "nonfinite_layers": nonfinite,
    }
    deviations = [own["deviation"] for own in layers.values() if "deviation" in own]
    if deviations:
        summary["deviation"] = math.sqrt(sum(d * d for d in deviations))
        total = math.sqrt(sum(norms[fqn] ** 2 for fqn, own in layers.items() if "deviation" in own))
        if total > 0:
            summary["deviation_rel"] = summary["deviation"] / total
    return {**summary, "layers": layers}


class JsonLines:
    """Appends records to a file, one JSON object per line; NaN and infinities become null."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "ab"):
            pass

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; the file is closed again, so that a killed run loses nothing written.

        Raises:
            OSError: where it cannot be written; what was there is as it was.
        """
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        with open(self._path, "ab", buffering=0) as file:
            size = file.tell() if file.seekable() else None
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                if size is not None:  # half a line would spoil the next one
                    with suppress(OSError):
                        file.truncate(size)
                raise


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
