"""OpenVINO converts the model and computes its logits."""

import openvino
import torch
from cells import TOKEN_IDS, Case, logits_of, main, same
from exported_logits import Logits


def converted(case: Case) -> str:
    model = case.load()
    program = torch.export.export(Logits(model), (TOKEN_IDS,), strict=False)
    made = openvino.convert_model(program)
    file = case.scratch / "model.xml"
    openvino.save_model(made, file, compress_to_fp16=False)
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([TOKEN_IDS.numpy()])[0]
    return same(torch.from_numpy(found), logits_of(model))


if __name__ == "__main__":
    main({"openvino": converted})
