"""optimum exports to ONNX; onnxruntime computes the logits."""

import json
from pathlib import Path

import onnxruntime
import torch
from cells import TOKEN_IDS, Case, logits_of, main, same
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.tasks import TasksManager

TASK = "text-generation"


def exported(case: Case) -> str:
    """Export by the exporter's settings for the base architecture, which a low-rank result has under its own name."""
    fields = json.loads((Path(case.directory) / "config.json").read_text())
    model = case.load()
    options = {}
    if "base_model_type" in fields:
        settings = TasksManager.get_exporter_config_constructor(
            "onnx", model_type=fields["base_model_type"], task=TASK, library_name="transformers"
        )
        options["custom_onnx_configs"] = {"model": settings(model.config)}
    expected = logits_of(model)
    onnx_export_from_model(model, case.scratch, task=TASK, do_validation=False, **options)
    session = onnxruntime.InferenceSession(case.scratch / "model.onnx", providers=["CPUExecutionProvider"])
    places = torch.arange(TOKEN_IDS.shape[1]).expand_as(TOKEN_IDS)
    given = {"input_ids": TOKEN_IDS, "attention_mask": torch.ones_like(TOKEN_IDS), "position_ids": places}
    wanted = {entry.name for entry in session.get_inputs()}
    found = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items() if name in wanted})[0]
    return same(torch.from_numpy(found), expected)


if __name__ == "__main__":
    main({"onnx": exported})
