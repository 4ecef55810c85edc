"""accelerate trains in two processes over gloo, replicated (DDP) and sharded (FSDP2): the losses are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from cells import TOKEN_IDS, Case, main

STEPS = 3
RATE = 1e-2


def losses_of(model: Any, rows: torch.Tensor, accelerator: Accelerator | None = None) -> list[float]:
    """Train by gradient descent on rows of tokens, and return the mean loss of all rows before each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    if accelerator:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        losses.append(float(accelerator.reduce(loss.detach(), "mean") if accelerator else loss.detach()))
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def worker(directory: str, kind: str, file: str) -> None:
    torch.set_num_threads(1)
    model = Case(directory, directory, Path()).load()
    sharded = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=sharded if kind == "fsdp" else None)
    index = accelerator.process_index
    losses = losses_of(model.train(), TOKEN_IDS[index : index + 1], accelerator)
    if accelerator.is_main_process:
        Path(file).write_text(json.dumps(losses))
    accelerator.end_training()


def trained(case: Case, kind: str) -> str:
    file = case.scratch / "losses.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, "--worker", case.directory, kind, str(file)], capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        errors = [line.partition("]:")[2] or line for line in done.stderr.splitlines() if "Error: " in line]
        raise RuntimeError((errors or ["no message"])[0])
    found, expected = json.loads(file.read_text()), losses_of(case.load().train(), TOKEN_IDS)
    assert found[-1] < found[0], f"the losses are {found}"
    largest = max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))
    assert largest < 1e-3, f"the losses are {found}, not {expected}"
    return f"{largest:.0e}"


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if sys.argv[1] == "--worker":
        worker(*sys.argv[2:])
    else:
        main({"ddp": lambda case: trained(case, "ddp"), "fsdp2": lambda case: trained(case, "fsdp")})
