"""ExecuTorch makes a program for XNNPACK and its runtime computes the logits."""

import torch
from cells import TOKEN_IDS, Case, logits_of, main, same
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from exported_logits import Logits


def lowered(case: Case) -> str:
    model = case.load()
    program = torch.export.export(Logits(model), (TOKEN_IDS,), strict=False)
    made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    found = Runtime.get().load_program(made.buffer).load_method("forward").execute([TOKEN_IDS])
    return same(found[0], logits_of(model))


if __name__ == "__main__":
    main({"executorch": lowered})
