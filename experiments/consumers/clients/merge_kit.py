"""mergekit averages a result with a changed copy of it; what it writes is the average.

mergekit does not copy the modelling file, without which the average of low-rank results does not load: users copy it.
"""

import shutil
from pathlib import Path

import torch
from cells import Case, logits_of, main, same
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def merged(case: Case) -> str:
    model = case.load()
    expected_model = case.load()
    torch.manual_seed(0)
    with torch.no_grad():
        for ours, mean in zip(model.parameters(), expected_model.parameters(), strict=True):
            changed = ours + 0.2 * ours.std(unbiased=False) * torch.randn_like(ours)
            mean.copy_((ours + changed) / 2)
            ours.copy_(changed)
    other = case.scratch / "other"
    shutil.copytree(case.directory, other, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    model.save_pretrained(other)
    entries = [{"model": str(where), "parameters": {"weight": 0.5}} for where in (case.directory, other)]
    fields = {"merge_method": "linear", "models": entries, "dtype": "float32"}
    options = MergeOptions(trust_remote_code=True, quiet=True, copy_tokenizer=True)
    run_merge(MergeConfiguration.model_validate(fields), str(case.scratch / "merged"), options)
    modelling_file = Path(case.directory) / "modeling_layer_surgery.py"
    if modelling_file.exists():
        shutil.copy(modelling_file, case.scratch / "merged")
    return same(logits_of(case.load(case.scratch / "merged")), logits_of(expected_model))


if __name__ == "__main__":
    main({"mergekit": merged})
