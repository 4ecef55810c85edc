"""accelerate trains in two processes over gloo, replicated (DDP) and sharded (FSDP2): the losses are those of one.

accelerate chooses FSDP only where it finds a GPU or the like. So its state is told, and all that follows is its own.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, debug_launcher
from accelerate.utils import DistributedType
from cells import TOKEN_IDS, Case, main
from torch.distributed.tensor import DTensor

STEPS = 3
RATE = 1e-2


def losses_of(
    model: Any, rows: torch.Tensor, accelerator: Accelerator | None = None, *, sharded: bool = False
) -> list[float]:
    """Train by gradient descent on rows of tokens, and return the mean loss of all rows before each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    if accelerator:
        model, optimizer = accelerator.prepare(model, optimizer)
        wrong = [name for name, tensor in model.named_parameters() if isinstance(tensor, DTensor) != sharded]
        assert not wrong, f"sharded is not {sharded} of {wrong}"
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        losses.append(float(accelerator.reduce(loss.detach(), "mean") if accelerator else loss.detach()))
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def worker(case: Case, sharded: bool, file: Path) -> None:
    model = case.load()
    accelerator = Accelerator(cpu=True)
    if sharded:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
            cpu_ram_efficient_loading=False,
        )
        accelerator.state.distributed_type = DistributedType.FSDP
    index = accelerator.process_index
    losses = losses_of(model.train(), TOKEN_IDS[index : index + 1], accelerator, sharded=sharded)
    if index == 0:
        file.write_text(json.dumps(losses))


def trained(case: Case, sharded: bool) -> str:
    file = case.scratch / "losses.json"
    debug_launcher(worker, (case, sharded, file), num_processes=2)
    found, expected = json.loads(file.read_text()), losses_of(case.load().train(), TOKEN_IDS)
    assert found[-1] < found[0], f"the losses are {found}"
    largest = max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))
    assert largest < 1e-3, f"the losses are {found}, not {expected}"
    return f"{largest:.0e}"


if __name__ == "__main__":
    main({"ddp": lambda case: trained(case, False), "fsdp2": lambda case: trained(case, True)})
