"""Facts about a model's layers: tied ones, token tables, and the model's adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module

from sharded_spd.engines.loader import find_loader
from sharded_spd.sharding.layout import ModelFacts
from sharded_spd.sharding.names import clean_fqn

_INITS = ("init_lora_weights", "init_weights")


def facts_of(
    model: Module,
    named: Iterable[tuple[str, Tensor]],
    by_raw: Mapping[str, str],
    tied: Iterable[tuple[str, str]] = (),
) -> ModelFacts:
    """Collect the facts of a model.

    `named` are its parameters under all their names, `by_raw` the clean names; `tied`: pairs of names of one
    parameter that a wrapper hides.
    """
    modules = list(model.modules())
    adapters: dict[str, str] = {}
    parts: set[str] = set()
    for module in modules:
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping):
            adapters.update({str(name): _init(config) for name, config in configs.items()})
        parts.update(getattr(module, "adapter_layer_names", ()))
    return ModelFacts(
        ties=_ties(named, by_raw, tied),
        tables=_tables(model, modules, by_raw),
        adapters=adapters,
        adapter_parts=frozenset(part for part in parts if isinstance(part, str)),
        loader=find_loader(modules),
    )


def _init(config: object) -> str:
    found = [getattr(config, name) for name in _INITS if hasattr(config, name)]
    return str(found[0]) if found else "true"


def _ties(
    named: Iterable[tuple[str, Tensor]], by_raw: Mapping[str, str], tied: Iterable[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    names: dict[int | str, list[str]] = {}
    keyed: list[tuple[int | str, str]] = [(id(param), raw) for raw, param in named]
    for first, other in tied:
        keyed += [(first, first), (first, other)]
    for key, raw in keyed:
        aliases, name = names.setdefault(key, []), by_raw[raw]
        if name not in aliases:
            aliases.append(name)
    return {aliases[0]: tuple(aliases[1:]) for aliases in names.values() if len(aliases) > 1}


def _tables(model: Module, modules: Iterable[Module], by_raw: Mapping[str, str]) -> frozenset[str]:
    """Embeddings, and the output layers of models that declare theirs (transformers)."""
    found: set[int] = set()
    for module in modules:
        if isinstance(module, (Embedding, EmbeddingBag)):
            found.add(id(module))
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                found.add(id(getter()))
            except (AttributeError, NotImplementedError):  # it has none
                continue
    clean = {clean_fqn(raw): name for raw, name in by_raw.items()}
    names: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if id(module) in found:
            for name in ("weight", "bias"):
                raw = clean_fqn(f"{prefix}.{name}" if prefix else name)
                names.update({clean[raw]} if raw in clean else ())
    return frozenset(names)
