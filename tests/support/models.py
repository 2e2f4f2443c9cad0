"""A model whose gradients are exactly what a test asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


class Probe(nn.Module):
    """A tree of modules that holds the given tensors under the given names; its loss is linear in them.

    `ties` maps a second name to the first name of the same parameter.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, ties: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._own: list[str] = []  # some wrappers take parameters out of `_parameters`
        params = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}
        for name, param in params.items():
            self._place(name, param)
        for alias, name in (ties or {}).items():
            self._place(alias, params[name])

    def _place(self, name: str, param: nn.Parameter) -> None:
        head, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(head, param)
            self._own.append(head)
            return
        if head not in self._modules:
            self.add_module(head, Probe({}))
        child = self._modules[head]
        if isinstance(child, Probe):
            child._place(rest, param)

    def forward(self, grads: Mapping[str, Tensor]) -> Tensor:
        """The sum of `<parameter, grads[name]>`; a parameter without an entry is not used."""
        terms = [_inner(getattr(self, name), grads[name]) for name in self._own if name in grads]
        for name, child in self._modules.items():
            below = {key[len(name) + 1 :]: grad for key, grad in grads.items() if key.startswith(f"{name}.")}
            if below and child is not None:
                terms.append(child(below))
        return torch.stack([term.to(terms[0].dtype) for term in terms]).sum()


def _inner(param: Tensor, grad: Tensor) -> Tensor:
    """This rank's share of `<param, grad>`; of a replicated one it is such that the gradient is Partial.

    The share alone, for its gradient is that of the sum over ranks, and no collective is needed.
    """
    grad = grad.to(param.dtype)
    if not isinstance(param, DTensor):
        return (param * grad).sum()
    mesh = param.device_mesh
    if all(placement.is_replicate() for placement in param.placements):
        rows = torch.stack([2 * grad, -grad])  # both exact, and so is their sum
        share = distribute_tensor(rows, mesh, [Shard(0)], src_data_rank=None).to_local()
        return (param.to_local(grad_placements=[Partial()]) * share).sum()
    share = distribute_tensor(grad, mesh, param.placements, src_data_rank=None).to_local()
    return (param.to_local() * share).sum()


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the layers by their names as a transformer's are (modified in place).

    `attn`, `embed`, `head` by rows (column-wise parallel), `mlp` by columns (row-wise parallel), `norm`
    replicated with its activations spread (sequence parallel); the others stay plain tensors.
    """
    for path, module in model.named_modules():
        for name, param in list(module.named_parameters(recurse=False)):
            placement: Shard | Replicate
            if any(part in path for part in ("attn", "embed", "head")):
                placement = Shard(0)
            elif "mlp" in path and param.ndim > 1:
                placement = Shard(1)
            elif "mlp" in path or "norm" in path:
                placement = Replicate()
            else:
                continue
            split = distribute_tensor(param.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(split, requires_grad=param.requires_grad))
