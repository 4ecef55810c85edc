"""What other tools do with a saved directory: one function for each, which raises if it does not work.

The tests run them on tiny models, `experiments/consumers/table.py` on the demo checkpoint. All load with transformers
alone, which runs the modelling file of low-rank directories and nothing of this package, and in float32, where the two
largest logits of a token are never equal.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.pytorch_utils import Conv1D

import layer_surgery

TASKS = Path(__file__).resolve().parents[1] / "calibration_data" / "tasks"
#: Largest difference between logits that is rounding, as a fraction of the largest logit.
ROUNDING = 1e-5
NEW_TOKENS = 8

#: Loads over two processes and has the first write its logits.
TENSOR_PARALLEL = """
import sys
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

torch.set_num_threads(1)
ids = load_file(sys.argv[2])["ids"]
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2)
).eval()
cut = [name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.to_local().shape != p.shape]
model.generation_config.eos_token_id = None
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
if torch.distributed.get_rank() == 0:
    save_file({"logits": logits.contiguous(), "tokens": tokens.contiguous()}, sys.argv[3], {"cut": ",".join(cut)})
torch.distributed.destroy_process_group()
"""


@dataclass
class Subject:
    """A saved directory, a place for files, and how much of the time that a check may take."""

    directory: Path
    scratch: Path
    compile_backend: str = "aot_eager"

    def load(self, **options: Any) -> PreTrainedModel:
        options = {"dtype": torch.float32} | options
        return AutoModelForCausalLM.from_pretrained(self.directory, trust_remote_code=True, **options).eval()

    @property
    def token_ids(self) -> Tensor:
        """Two sequences [2, 12] int64."""
        vocabulary = self.load().get_input_embeddings().weight.shape[0]
        return torch.randint(3, min(vocabulary, 300), (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: nn.Module, token_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits


def check_close(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    found, expected = found.detach().float(), expected.detach().float()
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise AssertionError(f"logits differ by {difference:.1e} of the largest, more than {tolerance:.0e}")


def check_near(found: Tensor, expected: Tensor, tolerance: float = 0.1) -> None:
    """Compare logits after weights were rounded. By their norm: the largest of thousands of differences says more about
    how far a model with layers missing amplifies rounding than about whether the tool works."""
    difference = float((found.detach().float() - expected).norm() / expected.norm())
    if not difference <= tolerance:
        raise AssertionError(f"logits differ by {difference:.1e} of their norm, more than {tolerance:.0e}")


def check_same(found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        raise AssertionError(f"tokens differ: {found.tolist()} instead of {expected.tolist()}")


def generated(model: PreTrainedModel, token_ids: Tensor, **options: Any) -> Tensor:
    """Return prompts with exactly `NEW_TOKENS` more, from the same random numbers in each call."""
    model.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(token_ids), "do_sample": False} | options
    torch.manual_seed(0)
    tokens: Tensor = model.generate(token_ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)
    assert tokens.shape[1] == token_ids.shape[1] + NEW_TOKENS
    return tokens


SAMPLED = {"do_sample": True, "top_k": 20}
STATIC = {"cache_implementation": "static", "disable_compile": True}


def loads(subject: Subject) -> None:
    """Every tensor has a place, and the model is the one that this package loads."""
    model, info = AutoModelForCausalLM.from_pretrained(
        subject.directory, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    if any(len(keys) for keys in info.values()):
        raise AssertionError(f"not every tensor has its place: {info}")
    ours = layer_surgery.load(subject.directory, dtype=torch.float32)
    check_close(logits_of(model, subject.token_ids), logits_of(ours, subject.token_ids), 0.0)


def text_pipeline(subject: Subject) -> None:
    """`pipeline("text-generation", DIR)` continues a text."""
    text = pipeline("text-generation", model=str(subject.directory), trust_remote_code=True)
    answer = text("the quick", do_sample=False, max_new_tokens=6, min_new_tokens=6)[0]["generated_text"]
    assert answer.startswith("the quick") and len(answer) > len("the quick"), answer


def dynamic_cache(subject: Subject) -> None:
    """Greedy and sampled `generate` give the same tokens with a cache as without."""
    model, ids = subject.load(), subject.token_ids
    for options in ({}, SAMPLED):
        check_same(generated(model, ids, **options), generated(model, ids, use_cache=False, **options))


def static_cache(subject: Subject) -> None:
    """Greedy and sampled `generate` give the same tokens with a static cache as without a cache."""
    model, ids = subject.load(), subject.token_ids
    for options in ({}, SAMPLED):
        check_same(generated(model, ids, **STATIC, **options), generated(model, ids, use_cache=False, **options))


def left_padding(subject: Subject) -> None:
    """A sequence in a left-padded batch is continued as by itself, with either cache."""
    model, ids = subject.load(), subject.token_ids
    alone = generated(model, ids[1:, 4:])[0]
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :4] = mask[1, :4] = 0
    for options in ({}, STATIC):
        check_same(generated(model, padded, attention_mask=mask, **options)[1, 4:], alone)


def compiled(subject: Subject) -> None:
    """`torch.compile` makes one graph of the model, with a cache and without, which gives its logits."""
    model, ids = subject.load(), subject.token_ids
    expected = logits_of(model, ids)
    torch._dynamo.reset()
    one_graph = torch.compile(model, backend=subject.compile_backend, fullgraph=True)
    with torch.no_grad():
        check_close(one_graph(input_ids=ids, use_cache=False).logits, expected)
        model.generation_config.cache_implementation = None
        model.forward = torch.compile(model.forward, backend=subject.compile_backend)
        tokens = generated(model, ids, **STATIC)
    check_same(tokens, generated(subject.load(), ids))


def disk_offload(subject: Subject) -> None:
    """`device_map="auto"` with too little memory keeps a part on the disk, and the logits."""
    ids = subject.token_ids
    model = subject.load()
    total = sum(p.nbytes for p in model.parameters())
    for share in (0.9, 0.7, 0.5):  # how much room is asked for beside the weights depends on the sizes of the modules
        offloaded = subject.load(
            device_map="auto", max_memory={"cpu": int(share * total)}, offload_folder=str(subject.scratch / "offload")
        )
        devices = set(getattr(offloaded, "hf_device_map", {}).values())
        if "disk" in devices:
            break
    else:
        raise AssertionError(f"nothing is on the disk: {devices}")
    check_close(logits_of(offloaded, ids), logits_of(model, ids))
    check_same(generated(offloaded, ids), generated(model, ids))


def in_bfloat16(subject: Subject) -> None:
    """Loaded in bfloat16 every parameter is, and the logits are near those in float32."""
    model, ids = subject.load(dtype=torch.bfloat16), subject.token_ids
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    check_near(logits_of(model, ids), logits_of(subject.load(), ids))


def saved_again(subject: Subject) -> None:
    """`save_pretrained` of the loaded model gives the same model, also in small shards."""
    model, ids = subject.load(), subject.token_ids
    for size in ("5GB", "100KB"):
        again = subject.scratch / f"again {size}"
        model.save_pretrained(again, max_shard_size=size)
        check_close(logits_of(Subject(again, subject.scratch).load(), ids), logits_of(model, ids), 0.0)


def lora(subject: Subject, chosen: Callable[[str], bool]) -> None:
    """Train adapters for three steps, save them, and load them on the model anew."""
    model, ids = subject.load(), subject.token_ids
    head = model.get_output_embeddings()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    targets = [name for name in linears if chosen(name)]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = logits_of(adapted.eval(), ids)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted.train()(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], f"training did not lower the loss: {losses}"
    after = logits_of(adapted.eval(), ids)
    assert not torch.allclose(after, before), "training changed nothing"
    folder = subject.scratch / f"adapter {len(targets)}"
    adapted.save_pretrained(folder)
    check_close(logits_of(PeftModel.from_pretrained(subject.load(), folder).eval(), ids), after)


def lora_on_whole_layers(subject: Subject) -> None:
    """LoRA on the linears that are not factors."""
    lora(subject, lambda name: not name.endswith("_factor"))


def lora_on_factors(subject: Subject) -> None:
    """LoRA on the factors of low-rank layers."""
    lora(subject, lambda name: name.endswith("_factor"))


def low_rank_of(directory: Path) -> dict[str, int]:
    ranks: dict[str, int] = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("low_rank", {})
    return ranks


def lm_eval(subject: Subject) -> None:
    """lm-eval's own command line measures a bundled task, offline."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--limit", "4"]
    command += ["--model_args", f"pretrained={subject.directory},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "bundled_agreement", "--include_path", str(TASKS)]
    out = run(command, subject)
    rows = [line for line in out.splitlines() if "bundled_agreement" in line and "acc" in line]
    assert rows, f"no result in what lm-eval printed: {out[-300:]}"


def quantised(subject: Subject) -> None:
    """torchao quantises the weights to 8 bits while transformers loads them."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    ids = subject.token_ids
    model = subject.load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    plain = [name for name, layer in layers.items() if type(layer.weight.data) is Tensor and layer.weight.numel()]
    assert layers and not plain, f"not quantised: {plain[:3]}"
    check_near(logits_of(model, ids), logits_of(subject.load(), ids))
    check_same(generated(model, ids), generated(model, ids, use_cache=False))


def exported(subject: Subject) -> None:
    """`torch.export` makes a program that is saved, loaded and gives the same logits."""
    model, ids = subject.load(), subject.token_ids
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
    torch.export.save(program, subject.scratch / "program.pt2")
    reloaded = torch.export.load(subject.scratch / "program.pt2").module()
    check_close(reloaded(input_ids=ids, use_cache=False).logits, logits_of(model, ids))


def without_head(subject: Subject) -> None:
    """`AutoModel` gives the last hidden states that the head reads."""
    model, ids = subject.load(), subject.token_ids
    decoder = AutoModel.from_pretrained(subject.directory, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        check_close(decoder(ids, use_cache=False).last_hidden_state, model.base_model(ids).last_hidden_state, 0.0)


def tensor_parallel(subject: Subject) -> None:
    """Two processes with half of each matrix give the same logits and tokens."""
    model, ids = subject.load(), subject.token_ids
    script, given, found = (subject.scratch / name for name in ("parallel.py", "ids.safetensors", "out.safetensors"))
    script.write_text(TENSOR_PARALLEL, encoding="utf-8")
    save_file({"ids": ids}, given)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*command, str(script), str(subject.directory), str(given), str(found)], subject)
    with safe_open(found, framework="pt") as file:
        logits, tokens, cut = file.get_tensor("logits"), file.get_tensor("tokens"), file.metadata()["cut"].split(",")
    for name, rank in low_rank_of(subject.directory).items():
        assert rank == 0 or {f"{name}.in_factor.weight", f"{name}.out_factor.weight"} & set(cut), f"{name} is not cut"
    assert len(cut) > 5 * model.config.num_hidden_layers, f"few matrices are cut: {cut}"
    check_close(logits, logits_of(model, ids), 1e-4)
    check_same(tokens, generated(model, ids))


def vllm_requirements(subject: Subject) -> None:
    """What vLLM's transformers backend asks of a model; vLLM itself is not run.

    Attention goes through transformers' attention interface. The first rule of the tensor-parallel plan that matches
    the name of a linear says how it is cut, so the rule of a factor must come before that of the linear it belongs to.
    """
    decoder = AutoModel.from_pretrained(subject.directory, trust_remote_code=True, dtype=torch.float32)
    model = subject.load()
    assert model.is_backend_compatible() and decoder.is_backend_compatible(), "attention is not exchangeable"
    head = model.get_output_embeddings()
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or linear is head:
            continue
        style = next((style for rule, style in model.tp_plan.items() if re.match(rule, name)), None)
        whole, _, factor = name.rpartition(".")
        if factor in ("in_factor", "out_factor"):
            by_columns = model.tp_plan[re.sub(r"\d+", "*", whole)] == "colwise"
            expected = {("in_factor", True): "replicate", ("out_factor", True): "colwise"}
            expected |= {("in_factor", False): "rowwise", ("out_factor", False): "replicate"}
            assert style == expected[factor, by_columns], f"{name} is {style}"
        assert style is not None, f"no rule for {name}"


def run(command: list[str], subject: Subject) -> str:
    """Run a program offline and return what it prints; raise with its last line if it fails."""
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(subject.scratch / "modules")}
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


@dataclass(frozen=True)
class Check:
    title: str
    function: Callable[[Subject], None]
    slow: bool = False
    """Starts processes of its own."""
    factors_only: bool = False
    """Means something only where there are factors."""


CHECKS: dict[str, Check] = {
    "loads": Check("`AutoModelForCausalLM`, every tensor in place", loads),
    "without_head": Check("`AutoModel` (hidden states)", without_head),
    "pipeline": Check('`pipeline("text-generation")`', text_pipeline),
    "dynamic_cache": Check("`generate`, greedy and sampled: dynamic cache as none", dynamic_cache),
    "static_cache": Check("`generate`, greedy and sampled: static cache as none", static_cache),
    "left_padding": Check("left-padded batch as the sequence alone", left_padding),
    "compile": Check("`torch.compile`, one graph, and generation", compiled),
    "disk_offload": Check('`device_map="auto"`, a part on disk', disk_offload),
    "bfloat16": Check("loaded in bfloat16", in_bfloat16),
    "save_again": Check("`save_pretrained` again, also sharded", saved_again),
    "lora_whole": Check("PEFT LoRA on whole layers: trained, saved, reloaded", lora_on_whole_layers),
    "lora_factors": Check("PEFT LoRA on the factors: trained, saved, reloaded", lora_on_factors, factors_only=True),
    "lm_eval": Check("lm-eval's own command line", lm_eval, slow=True),
    "torchao": Check("torchao, 8-bit weights", quantised),
    "export": Check("`torch.export`, saved and loaded", exported),
    "tensor_parallel": Check("tensor parallelism, two processes (gloo)", tensor_parallel, slow=True),
    "vllm": Check("what vLLM's transformers backend asks (vLLM not run)", vllm_requirements),
}


def make_subjects(original: Path, directory: Path, *, first: int, second: int) -> dict[str, Path]:
    """Make one directory of each kind from `original`, operating on two of its layers, and return them by name."""
    options: dict[str, Any] = {"eval_data": None, "method": "svd"}
    kinds = {name: directory / name for name in ("plain", "low_rank", "no_attention", "narrowed", "dense")}
    layers = [first, second]
    layer_surgery.compress(original, kinds["plain"], layers=layers, keep=0, **options)
    layer_surgery.compress(original, kinds["low_rank"], layers=layers, keep=0.3, **options)
    layer_surgery.compress(original, kinds["no_attention"], layers=layers, keep=0, remove="attention", **options)
    data: dict[str, Any] = {"samples": 16, "sequence_length": 32, "refit": False, "eval_data": None, "multiple": 4}
    layer_surgery.compress(original, kinds["narrowed"], target_parameters=0.85, **data)
    layer_surgery.export_dense(kinds["low_rank"], kinds["dense"])
    return {"original": original, **kinds}
