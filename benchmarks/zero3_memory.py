"""What SPD costs in memory under ZeRO-3: measured bytes per rank against the plan.

    python benchmarks/zero3_memory.py                       # 500 M parameters, 2 ranks, about 12 GB in all
    python benchmarks/zero3_memory.py --parameters 2000000  # seconds

Makes a Llama-shaped model, saves it once as bfloat16 safetensors, loads it under ZeRO-3 with `zero.Init`,
attaches with a snapshot and with the file as anchor, and takes 3 steps each. Ends with code 1 where the
anchor costs more than 2 bytes per parameter divided by the ranks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import socket
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEPS = 3


def llama_config(parameters: int) -> Any:
    """A Llama whose layers fill up about that many parameters."""
    from transformers import LlamaConfig

    small = parameters < 50_000_000
    hidden, inner, vocabulary = (128, 352, 2000) if small else (1280, 3456, 32000)
    per_layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    layers = max(1, round((parameters - 2 * vocabulary * hidden) / per_layer))
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=128,
    )


def save_model(parameters: int, directory: Path) -> None:
    """Random weights, written once, in several files."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(parameters)).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="200MB")


def resident(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def settings(sub_group: int) -> dict[str, Any]:
    """DeepSpeed's JSON."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "sub_group_size": sub_group, "reduce_bucket_size": 50_000_000},
    }


def run_rank(rank: int, world: int, port: int, directory: str, anchor: str, out: str) -> None:
    """Load, attach, train; write what this rank measured."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's calls of torch, hundreds of them
    import deepspeed
    import torch
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from sharded_spd import SPDConfig, attach
    from sharded_spd.integrations.deepspeed import disable_shm_op

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    disable_shm_op()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo")
    config = settings(50_000_000)
    keep = HfDeepSpeedConfig(config)  # from_pretrained looks for it
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    del keep
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    parameters = sum(p.ds_numel for p in engine.module.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    source = "snapshot" if anchor == "snapshot" else directory
    projector = attach(engine, config=SPDConfig(weight_decay=1.0, anchor=source))
    peak, after = resident("VmHWM"), resident("VmRSS")
    held = sum(a.values.nbytes for a in projector.export_anchors().values() if a.values is not None)
    losses, rates = [], []
    for step in range(STEPS):
        tokens = torch.randint(0, 1000, (1, 32), generator=torch.Generator().manual_seed(step * world + rank))
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        rates.append(projector.metrics()["activation_rate"])
    wrapper = engine.optimizer
    masters = wrapper.fp32_partitioned_groups_flat
    states = [t for state in wrapper.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    measured = {
        "parameters": parameters,
        "num_layers": len(projector.export_anchors()),
        "model weights": sum(t.nbytes for t in wrapper.fp16_partitioned_groups_flat),
        "float32 masters": sum(t.nbytes for t in masters),
        "optimizer state": sum(t.nbytes for t in states),
        "anchor": held,
        "grown by attach": after - before,
        "peak while attaching": peak - before,
        "peak of the run": resident("VmHWM"),
        "losses": losses,
        "activation_rates": rates,
    }
    Path(out, f"{anchor}-{rank}.json").write_text(json.dumps(measured))
    torch.distributed.barrier()
    # gloo's threads now and then abort an interpreter that takes itself down.
    sys.stdout.flush()
    os._exit(0)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> int:
    """Run both anchors, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=500_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    given = parser.parse_args()
    import torch.multiprocessing as mp

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="zero3-memory-") as folder:
        model = Path(folder, "model")
        process = mp.get_context("spawn").Process(target=save_model, args=(given.parameters, model))
        process.start()
        process.join()
        for anchor in ("snapshot", "file"):
            arguments = (given.ranks, free_port(), str(model), anchor, folder)
            mp.spawn(run_rank, args=arguments, nprocs=given.ranks)
            found = [json.loads(Path(folder, f"{anchor}-{r}.json").read_text()) for r in range(given.ranks)]
            results[anchor] = {
                key: value if isinstance(value, list) else max(one[key] for one in found)
                for key, value in found[0].items()
            }
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "ranks": given.ranks,
        "results": results,
    }
    failed = show(report)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(failed)


def show(report: dict[str, Any]) -> bool:
    """Print the largest rank's bytes beside the plan; whether the anchor exceeds it."""
    first, ranks = report["results"]["snapshot"], report["ranks"]
    share = first["parameters"] / ranks
    padding = 2 * ranks * first["num_layers"]  # each layer is padded to whole partitions
    plan = {"model weights": 2, "float32 masters": 4, "optimizer state": 8, "anchor": 2}
    print(f"{first['parameters'] / 1e6:.1f} M parameters, ZeRO-3, {ranks} ranks; MiB of the largest rank")
    print(f"{'':24}{'plan':>10}{'snapshot':>12}{'file':>12}")
    rows = ("model weights", "float32 masters", "optimizer state", "anchor", "grown by attach")
    failed = False
    for row in (*rows, "peak while attaching", "peak of the run"):
        wanted = f"{plan[row] * share / 2**20:10.1f}" if row in plan else " " * 10
        found = [report["results"][anchor][row] for anchor in ("snapshot", "file")]
        print(f"{row:24}{wanted}" + "".join(f"{value / 2**20:12.1f}" for value in found))
        failed |= row == "anchor" and max(found) > plan[row] * share + padding
    for anchor, found in report["results"].items():
        losses = ", ".join(f"{loss:.3f}" for loss in found["losses"])
        rates = ", ".join(f"{rate:.0%}" for rate in found["activation_rates"])
        print(f"{anchor}: losses {losses}; layers pulled {rates}")
    if failed:
        print("the anchor costs more than 2 bytes per parameter / ranks", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
