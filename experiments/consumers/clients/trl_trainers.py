"""TRL trains a result by its path, with LoRA on all linears: supervised, by preferences, from the original."""

from typing import Any

from cells import Case, main
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

TEXTS = Dataset.from_dict({"text": ["The harbour lay still in the morning, and nobody was about."] * 8})
PAIRS = Dataset.from_dict(
    {"prompt": ["The harbour"] * 8, "chosen": [" lay still."] * 8, "rejected": [" was was was."] * 8}
)
CHATS = Dataset.from_dict(
    {
        "messages": [
            [
                {"role": "user", "content": "Where was the boat?"},
                {"role": "assistant", "content": "It lay in the harbour, still as the water."},
            ]
        ]
        * 8
    }
)
#: The checkpoints are no chat models and have no template of their own.
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def settings(case: Case) -> dict[str, Any]:
    """Return what all three trainers are told: a few steps on the CPU, and how the path is loaded."""
    return {
        "output_dir": str(case.scratch / "trained"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "max_length": 64,
        "model_init_kwargs": {"trust_remote_code": True, "dtype": "float32"},
    }


def losses_of(trainer: Trainer) -> str:
    """Train, and return the first and the last loss."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    return f"{losses[0]:.2f} to {losses[-1]:.2f}"


def sft(case: Case) -> str:
    arguments = SFTConfig(**settings(case))
    return losses_of(SFTTrainer(model=case.directory, args=arguments, train_dataset=TEXTS, peft_config=LORA))


def dpo(case: Case) -> str:
    arguments = DPOConfig(**settings(case))
    return losses_of(DPOTrainer(model=case.directory, args=arguments, train_dataset=PAIRS, peft_config=LORA))


def gkd(case: Case) -> str:
    tokenizer = case.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = GKDTrainer(
        model=case.directory,
        teacher_model=case.load(case.original),
        processing_class=tokenizer,
        args=GKDConfig(**settings(case), max_new_tokens=8, lmbda=0.0),
        train_dataset=CHATS,
        peft_config=LORA,
    )
    return losses_of(trainer)


if __name__ == "__main__":
    main({"trl_sft": sft, "trl_dpo": dpo, "trl_gkd": gkd})
