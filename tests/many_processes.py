"""What `test_processes.py` has several processes do, each of which runs this file: compressions, and ways to fail."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from layer_surgery import UserError, api, parallel
from layer_surgery.cli.main import main
from layer_surgery.errors import NumericalError
from layer_surgery.machine import version
from layer_surgery.records.sweep import SweepPoint
from layer_surgery.runs.sweep.measuring import Measuring
from layer_surgery.walk.finite import Finite
from layer_surgery.walk.walk import Walk

TOKENS: dict[str, Any] = {"samples": 20, "sequence_length": 12, "batch_size": 3}
#: By name, the model's type and the options. 20 sequences make 7 micro-batches: in the last round some have none.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mix": ("llama", {"target_parameters": 0.8, "components": ["channels", "singular", "heads", "bypass"]}),
    "grasp": ("llama", {"layers": [1, 2], "keep": 0.5, "method": "grasp", "refit": True, "decomposition": "leading"}),
    "removal": ("llama", {"target_layers": 3, "keep": 0.0, "scorer": "block_influence"}),
    "experts": ("mixtral", {"target_parameters": 0.9, "decomposition": "leading"}),
}


#: Six points. Two of the three that remove a layer outright are the same model (`mix` refits, the others do not).
SWEEP: dict[str, Any] = {"target_layers": [3], "keep": [0.0, 0.5], "method": ["svd", "fisher", "mix"]}


def sweep_options(text: Path) -> dict[str, Any]:
    """Return the options of a sweep, on the tokens of a text."""
    options: dict[str, Any] = {**TOKENS, **SWEEP, "calibration": [text], "eval_data": [text], "refit_general": 0.0}
    return options | {"scorer": "block_influence"}


def options_of(case: str, text: Path) -> dict[str, Any]:
    """Return the options of a case, on the tokens of a text."""
    return {**TOKENS, **CASES[case][1], "calibration": [text], "eval_data": [text], "refit_general": 0.0}


def refusal(action: Any) -> str:
    """Return with what message something is refused."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def other_release(model: Path, text: Path) -> str:
    """Return how it is refused that the last process has another release of torch."""
    last = parallel.group().rank == parallel.group().world - 1

    def other(package: str) -> str | None:
        return "0.1" if last and package == "torch" else version(package)

    with mock.patch("layer_surgery.runs.session.version", other):
        return refusal(lambda: api.score(model, scorer="block_influence", calibration=[text], **TOKENS))


def other_text(folder: Path) -> str:
    """Return how it is refused that a file of one name holds another text for each process."""
    own = folder / f"of {parallel.group().rank}"
    own.mkdir()
    words = (folder / "text.txt").read_text(encoding="utf-8")
    (own / "own.txt").write_text(words[parallel.group().rank * len(words) // 2 :], encoding="utf-8")
    with chdir(own):
        said = refusal(lambda: api.score(folder / "llama", scorer="block_influence", calibration=["own.txt"], **TOKENS))
    return said


def not_finite_in_one(model: Path, text: Path) -> list[str]:
    """Return what is said in each process if only the last sees a number that is not finite."""
    see, said = Finite.see, ""

    def broken(self: Finite, values: Tensor, valid: Tensor) -> None:
        last = parallel.group().rank == parallel.group().world - 1
        see(self, values * torch.nan if last else values, valid)

    Finite.see = broken  # type: ignore[method-assign]
    try:
        api.score(model, scorer="block_influence", calibration=[text], **TOKENS)
    except NumericalError as error:
        said = str(error)
    finally:
        Finite.see = see  # type: ignore[method-assign]
    return parallel.gather(said)


def compress_all(folder: Path) -> None:
    """Carry out all cases; write down how what several processes cannot do is refused."""
    text = folder / "text.txt"
    with parallel.joined() as group:
        refusals = {
            "options": refusal(lambda: parallel.agree({"--seed": group.rank}, "give all the same")),
            "too many processes": refusal(
                lambda: api.compress(
                    folder / "llama", **options_of("mix", text) | {"samples": 5, "batch_size": 5}, no_save=True
                )
            ),
            "local stage": refusal(
                lambda: api.compress(
                    folder / "llama", **options_of("mix", text), no_save=True, heal={"stages": ["local"]}
                )
            ),
            "steps": refusal(
                lambda: api.compress(
                    folder / "llama", **options_of("mix", text), no_save=True, heal={"step_sequences": 7}
                )
            ),
            "output": refusal(lambda: api.compress(folder / "llama", **options_of("mix", text), output=text)),
            "release": other_release(folder / "llama", text),
            "text": other_text(folder),
            "device": refusal(lambda: api.score(folder / "llama", device="cuda", scorer="random")),
            "not finite": not_finite_in_one(folder / "llama", text),
        }
        for case, (family, _) in CASES.items():
            api.compress(folder / family, **options_of(case, text), output=folder / f"{case} by {group.world}")
        measured = sweep(folder)
        if group.rank == 0:
            (folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
            (folder / "refusals.json").write_text(json.dumps(refusals), encoding="utf-8")


def sweep(folder: Path) -> list[int]:
    """Measure the points of a sweep; return how many each process has measured."""
    point, count = Measuring.point, 0

    def counted(self: Measuring, *arguments: Any) -> SweepPoint:
        nonlocal count
        count += 1
        return point(self, *arguments)

    Measuring.point = counted  # type: ignore[method-assign]
    try:
        api.sweep(folder / "llama", output=folder / "sweep by 2", **sweep_options(folder / "text.txt"))
    finally:
        Measuring.point = point  # type: ignore[method-assign]
    return parallel.gather(count)


def fail(rank: str, way: str) -> None:
    """Run the command line, but have a process end in the midst of the statistics: by an error, or by a signal."""
    walk_back = Walk.backpropagate

    def broken(self: Walk, *arguments: Any, **keywords: Any) -> None:
        if os.environ["RANK"] == rank:
            if way in signal.Signals.__members__:
                os.kill(os.getpid(), signal.Signals[way])
            raise RuntimeError("on purpose")
        walk_back(self, *arguments, **keywords)

    Walk.backpropagate = broken  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    what = sys.argv.pop(1)
    if what == "compress":
        compress_all(Path(sys.argv[1]))
    else:
        fail(what, sys.argv.pop(1))
