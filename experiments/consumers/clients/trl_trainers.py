"""TRL trains a result by its path, with LoRA on all linears: supervised, by preferences, from the original."""

from typing import Any

from cells import Case, main
from datasets import Dataset
from peft import LoraConfig
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


def train(case: Case, trainer: Any, config: Any, data: Dataset, options: dict[str, Any], **other: Any) -> str:
    arguments = config(
        output_dir=str(case.scratch / "trained"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        model_init_kwargs={"trust_remote_code": True, "dtype": "float32"},
        **options,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    run = trainer(model=case.directory, args=arguments, train_dataset=data, peft_config=lora, **other)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    return f"{losses[0]:.2f} to {losses[-1]:.2f}"


def sft(case: Case) -> str:
    return train(case, SFTTrainer, SFTConfig, TEXTS, {"max_length": 32})


def dpo(case: Case) -> str:
    return train(case, DPOTrainer, DPOConfig, PAIRS, {"max_length": 32})


def gkd(case: Case) -> str:
    tokenizer = case.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"max_length": 64, "max_new_tokens": 8, "lmbda": 0.0, "disable_dropout": True}
    teacher = case.load(case.original)
    return train(case, GKDTrainer, GKDConfig, CHATS, options, teacher_model=teacher, processing_class=tokenizer)


if __name__ == "__main__":
    main({"trl_sft": sft, "trl_dpo": dpo, "trl_gkd": gkd})
