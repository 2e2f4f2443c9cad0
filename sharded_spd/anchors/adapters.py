"""Which parameters of an adapter are neutral at zero, and which only at their start.

At zero a parameter keeps the pre-trained function if it is a factor of a product, or a summand, beside the
pre-trained weights: LoRA's A and B. Gains (IA3, DoRA's magnitude) do not, nor do adapters that change the
base weight to compensate for their initial values (PiSSA).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from sharded_spd.sharding.layout import ModelFacts

Neutral = Literal["zero", "start"]
_LORA = re.compile(r"(?:lora_(?:embedding_)?[ABE]|lora_[ab]|lora_(?:up|down))")
_AT_ZERO = re.compile(
    r"hada_\w+|lokr_\w+|p?vera_lambda_[bd]|oft_(?:embedding_)?[Rr]|boft_R|fourierft_spectrum|waveft_spectrum|"
    r"vblora_\w+|miss_block|bone_block|shira_weight|c3a_kernel|road_theta|randlora_(?:lambda|gamma)|tinylora_v|"
    r"delora_(?:A|B|lambda)|gralora_\w+|peanut_\w+|hira_\w+|lily_\w+|unilora_theta_d|beft_bias|"
    r"frod_lambda_s_values|adamss_[AB]"
)
_AT_START = re.compile(
    r"lora_magnitude_vector|magnitude|ia3_l|boft_s|hra_u|road_alpha|psoft_\w+|frod_lambda_l|osf_\w+|deft_\w+|"
    r"ln_tuning_layers|trainable_tokens_delta|token_adapter|prompt_encoder|prompt_embeddings|adaption_(?:gate|prompt)|"
    r"lora_\w+"
)
"""Any other `lora_` is of an unknown kind, and so neutral only at its start."""
_PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica", "lycoris"})
"""The others (pissa, olora, corda, loftq, lora_ga, ...) change the base weight, or are not known."""


def neutral_at(fqn: str, facts: ModelFacts) -> Neutral | None:
    """Where adapter parameter `fqn` keeps the pre-trained function; None: it belongs to no adapter."""
    parts = fqn.split(".")
    for i, part in enumerate(parts):
        if _LORA.fullmatch(part) or _AT_ZERO.fullmatch(part):
            inits = [facts.adapters[name].lower() for name in parts[i + 1 :] if name in facts.adapters]
            return "zero" if all(init in _PLAIN_INITS for init in inits) else "start"
        if _AT_START.fullmatch(part) or part in facts.adapter_parts:
            return "start"
    return None


def unsettled(nonzero: Mapping[str, bool], facts: ModelFacts) -> list[str]:
    """Factors anchored at zero with products that do not start at zero, if their initialisation is unknown.

    `nonzero`: whether a layer that is anchored at zero has another value now.
    """
    pairs: dict[str, list[str]] = {}
    for fqn in nonzero:
        parts = fqn.split(".")
        if any(_LORA.fullmatch(part) for part in parts) and not any(p in facts.adapters for p in parts):
            key = ".".join("lora" if _LORA.fullmatch(part) else part for part in parts)
            pairs.setdefault(key, []).append(fqn)
    return [fqns[0] for fqns in pairs.values() if len(fqns) > 1 and all(nonzero[fqn] for fqn in fqns)]


def kinds(fqns: Iterable[str]) -> list[str]:
    """The parts of names that are an adapter's: `lora_magnitude_vector`, `ia3_l`."""
    found = {
        part
        for fqn in fqns
        for part in fqn.split(".")
        if _AT_START.fullmatch(part) or _AT_ZERO.fullmatch(part)
    }
    return sorted(found)
