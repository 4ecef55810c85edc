"""Options that say where and how computations run, and how a run speaks to its user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import attrs

from layer_surgery.config.choices import HEAD_CHOICES, POOLING_CHOICES
from layer_surgery.config.declaring import Group, Options, about, at_least, one_of, path
from layer_surgery.errors import UserError
from layer_surgery.linalg.decomposition import DECOMPOSITIONS, WIDE, Decomposition
from layer_surgery.progress import Ui

if TYPE_CHECKING:
    import torch  # at run time only where it is needed: the command line reads defaults from here without it
    from transformers import PreTrainedTokenizerBase

#: The tool's own use of memory on a CPU must not grow with the model, so these limits are fixed.
CPU_MEMORY_BYTES = 1 << 29
#: Hidden size from which a CPU computes in bfloat16 if it can. Smaller models take little time in float32, which gives
#: the same numbers on every machine.
BFLOAT16_FROM = 2048
DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_SEED = (1 << 63) - 1


def _tokenizer(value: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    # Not by its class, whose import takes seconds: by what is asked of it.
    if value is not None and not (callable(value) and hasattr(value, "get_vocab")):
        raise UserError(f"tokenizer is {value!r}; give a tokenizer of transformers (AutoTokenizer.from_pretrained).")
    return value


def _ui(value: Ui | None) -> Ui:
    return value or Ui()


def _device_name(value: str | torch.device) -> str:
    return str(value)


def _dtype_name(value: str | torch.dtype) -> str:
    return str(value).removeprefix("torch.")


@attrs.frozen(kw_only=True, slots=False)
class CallConfig(Options):
    """Keyword arguments of the Python interface that are objects, and no settings."""

    GROUP: ClassVar[Group] = "Runtime"

    tokenizer: PreTrainedTokenizerBase | None = attrs.field(
        default=None,
        converter=_tokenizer,
        metadata=about(
            "Tokenizer of a model that is given in memory.", group="Model and data", terminal=False, recorded=False
        ),
    )
    ui: Ui = attrs.field(
        default=None,
        converter=_ui,
        metadata=about("Receiver of progress and notes; silent by default.", terminal=False, recorded=False),
    )
    command: str | None = attrs.field(
        default=None, metadata=about("Command line to keep in the record.", terminal=False, recorded=False)
    )


@attrs.frozen(kw_only=True, slots=False)
class RuntimeConfig(CallConfig):
    """Where and how computations run."""

    device: str = attrs.field(
        default="auto",
        converter=_device_name,
        metadata=about("Where to compute.", metavar="auto|cpu|cuda[:N]", choices=("auto", "cpu", "cuda")),
    )
    dtype: str = attrs.field(
        default="auto",
        converter=_dtype_name,
        metadata=about(
            "dtype of computation; auto is the checkpoint's own on CUDA and float32 on a CPU, or bfloat16 if it is "
            f"stored so, {BFLOAT16_FROM:,} or more wide, and the CPU multiplies bfloat16. The saved checkpoint always "
            "has the original's dtype.",
            choices=("auto", *DTYPES),
        ),
    )
    decomposition: Decomposition = attrs.field(
        default="auto",
        validator=one_of(DECOMPOSITIONS),
        metadata=about(
            "How linears are decomposed: exact, or leading (components up to the largest useful rank, by matrix "
            f"products; much faster where a side is {WIDE:,} or more); auto is leading for those, exact for others.",
            choices=DECOMPOSITIONS,
        ),
    )
    batch_size: int = attrs.field(
        default=8,
        validator=at_least(1),
        metadata=about(
            "Sequences at a time. More are faster and take more memory; sums are then rounded in another order, so "
            "that results differ in their last digits, and with them the bytes of the result."
        ),
    )
    memory_limit: int | None = attrs.field(
        default=None,
        validator=at_least(1),
        metadata=about(
            "Stay below this, such as 8GB, where there is a choice of what to keep in memory, and refuse a refit that "
            "does not fit.",
            form="size",
            metavar="SIZE",
            default="what is free",
        ),
    )
    seed: int = attrs.field(default=0, validator=at_least(0), metadata=about("Seed of every random choice."))
    trust_remote_code: bool = attrs.field(
        default=False,
        metadata=about("Run Python code that comes with the checkpoint.", group="Model and data"),
    )
    head: str = attrs.field(
        default="auto",
        validator=one_of(HEAD_CHOICES),
        metadata=about(
            "What the model is for: auto is what its files say; embedding takes any transformer for an embedding "
            "model (a directory of sentence-transformers is one without).",
            choices=HEAD_CHOICES,
            group="Model and data",
        ),
    )
    pooling: str | None = attrs.field(
        default=None,
        metadata=about(
            "How --head embedding makes one vector of the states of a text's tokens.",
            default="none: it has to be said",
            choices=POOLING_CHOICES,
            group="Model and data",
        ),
    )
    resident_bytes: int | None = attrs.field(
        default=None,
        metadata=about(
            "Keep all layers on the device if together they take at most this much, instead of reading each when "
            "needed.",
            default="512 MiB on a CPU, half of the free memory on CUDA",
            terminal=False,
        ),
    )
    boundary_bytes: int | None = attrs.field(
        default=None,
        metadata=about(
            "Keep hidden states at layer boundaries on the device up to this much, and beyond it in a scratch file.",
            default="512 MiB on a CPU, a quarter of the free memory on CUDA",
            terminal=False,
        ),
    )
    scratch: Path | None = attrs.field(
        default=None,
        converter=path,
        metadata=about(
            "Directory for scratch files.",
            default="beside the output, else the system's temporary directory",
            terminal=False,
        ),
    )

    def _check(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UserError(f"--dtype is '{self.dtype}'; allowed: auto, {', '.join(DTYPES)}.")
        if self.pooling is not None and self.pooling not in POOLING_CHOICES:
            raise UserError(f"--pooling is '{self.pooling}'; allowed: {', '.join(POOLING_CHOICES)}.")
        if self.seed > _LARGEST_SEED:
            raise UserError(f"--seed is {self.seed}; allowed: 0 to {_LARGEST_SEED}.")
        if self.scratch is not None and not self.scratch.is_dir():
            raise UserError(f"scratch is {self.scratch}, which is not a directory; make it, or leave it out.")

    def torch_device(self) -> torch.device:
        """Return the device; `UserError` if it is not there."""
        import torch

        from layer_surgery import parallel
        from layer_surgery.devices import KINDS, cuda_devices

        name, group, there = self.device, parallel.group(), cuda_devices()
        if name == "auto":
            name = "cuda" if there else "cpu"
        kind, _, number = name.partition(":")
        if kind not in KINDS or (number and not number.isdigit()) or name.endswith(":"):
            raise UserError(f"--device is '{self.device}'; allowed: auto, cpu, cuda, cuda:N.")
        if kind == "cuda" and not there:
            raise UserError(f"--device is '{self.device}', but torch sees no CUDA device; use --device cpu.")
        if kind == "cuda" and number and int(number) >= there:
            raise UserError(f"--device is '{self.device}', but there are {there} CUDA devices.")
        if kind == "cuda" and group.world > 1:
            if number:
                raise UserError(
                    f"--device is '{self.device}', but each of {group.world} processes takes a GPU of its own; give "
                    "--device cuda."
                )
            if group.local_world > there:
                raise UserError(
                    f"--device is '{self.device}', but this machine has {there} CUDA devices for "
                    f"{group.local_world} processes; start --nproc-per-node {there}, or give "
                    "--device cpu."
                )
            name = f"cuda:{group.local_rank}"
            torch.cuda.set_device(group.local_rank)
        return torch.device(name)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Return `resident_bytes` and `boundary_bytes` for a device."""
        from layer_surgery.devices import memory_shares

        resident, boundary = memory_shares(device, CPU_MEMORY_BYTES)
        if self.memory_limit is not None:
            resident, boundary = min(resident, self.memory_limit // 2), min(boundary, self.memory_limit // 4)
        return (
            resident if self.resident_bytes is None else self.resident_bytes,
            boundary if self.boundary_bytes is None else self.boundary_bytes,
        )

    def torch_dtype(self, device: torch.device, stored: torch.dtype, hidden_size: int) -> torch.dtype:
        """Return the dtype of computation on `device` for a checkpoint of this width, stored in `stored`."""
        import torch

        from layer_surgery.devices import fast_dtype

        if self.dtype != "auto":
            dtype: torch.dtype = getattr(torch, self.dtype)
            return dtype
        return fast_dtype(device, stored, wide=hidden_size >= BFLOAT16_FROM)
