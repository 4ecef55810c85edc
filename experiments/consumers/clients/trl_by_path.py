"""TRL trains a result by its path, with LoRA on all linears: supervised, then by preferences (DPO)."""

import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

TEXTS = Dataset.from_dict({"text": ["The harbour lay still in the morning, and nobody was about."] * 8})
PAIRS = Dataset.from_dict(
    {"prompt": ["The harbour"] * 8, "chosen": [" lay still."] * 8, "rejected": [" was was was."] * 8}
)
directory = sys.argv[1]
losses = {}
with tempfile.TemporaryDirectory() as folder:
    options = {
        "output_dir": str(Path(folder) / "trained"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "model_init_kwargs": {"trust_remote_code": True, "dtype": "float32"},
    }
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, trainer, config, data in (
        ("sft", SFTTrainer, SFTConfig, TEXTS),
        ("dpo", DPOTrainer, DPOConfig, PAIRS),
    ):
        own = dict(options, model_init_kwargs=dict(options["model_init_kwargs"]))
        run = trainer(model=directory, args=config(**own, max_length=32), train_dataset=data, peft_config=lora)
        run.train()
        losses[name] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
assert all(found[-1] < found[0] for found in losses.values()), losses
print("\n" + json.dumps({name: [found[0], found[-1]] for name, found in losses.items()}))
