"""Identity of a run that may go on after it was stopped: all that decides what calibration and surgery give."""

from typing import Any

import attrs
import torch

from layer_surgery import parallel
from layer_surgery.config import CompressConfig
from layer_surgery.config.commands import OutputConfig
from layer_surgery.config.evaluation import EvaluationConfig
from layer_surgery.config.healing import HealAfterwardsConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.machine import PACKAGES, code_sha256, version
from layer_surgery.records.provenance import portable
from layer_surgery.runs.session import Session

#: Options of which the identity has something better, or which change time and memory only.
_OTHERWISE = {
    *("calibration", "text_column", "plan", "device", "dtype"),
    *("cache", "trust_remote_code", "memory_limit", "scratch", "resident_bytes", "boundary_bytes"),
}


def run_identity(
    session: Session, config: CompressConfig, sha256: str, tokens: PackedTokens | None, general: PackedTokens | None
) -> dict[str, Any]:
    """Return hashes and options, by what messages call them.

    Every option is among them but for those that only say what is measured, how it is healed, and where results go; so
    that a new one is not forgotten. Those that change how sums are rounded are: the result has the same bytes.
    """
    groups = (EvaluationConfig, HealAfterwardsConfig, OutputConfig)
    afterwards = {field.name for group in groups for field in attrs.fields(group)}
    options = {
        f"--{name.replace('_', '-')}": value
        for name, value in config.described().items()
        if name not in _OTHERWISE | afterwards and not name.startswith("heal_")
    }
    return {
        "the model (sha256)": sha256,
        "--calibration (sha256 of its tokens)": None if tokens is None else tokens.sha256,
        "the general text (sha256 of its tokens)": None if general is None else general.sha256,
        **portable(options),
        "--plan": None if config.plan is None else config.plan.plan.to_dict(),
        "--device": session.device.type,
        "--dtype": str(session.dtype),
        "CPU threads": torch.get_num_threads(),
        "processes": parallel.group().world,
        **{name: version(name) for name in PACKAGES},
        "the code of layer-surgery (sha256)": code_sha256(),
    }
