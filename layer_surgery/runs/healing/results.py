"""What comes of a training: its tensors as they would be saved, whether they are better, and the record of before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.result import with_new_tensors
from layer_surgery.checkpoint.tensors import SafetensorsSource, TensorSpec
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.evaluation.perplexity import window_losses
from layer_surgery.healing.student import Student
from layer_surgery.healing.training import regret
from layer_surgery.healing.windows import HealingData
from layer_surgery.records import UnhealedRecord
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.session import Session


class Results:
    """Checkpoints with trained tensors in scratch files of a session."""

    def __init__(self, session: Session, name: str) -> None:
        """Name them after the checkpoint `name`."""
        self._session, self._name = session, f"{name} and healing"

    def with_files(self, checkpoint: Checkpoint, files: Sequence[Path]) -> Checkpoint:
        """Return a checkpoint with the tensors of these files in the place of its own."""
        return with_new_tensors(checkpoint, SafetensorsSource(files), self._name)

    def of_student(self, checkpoint: Checkpoint, student: Student) -> Checkpoint:
        """Write what was trained, in the checkpoint's own dtypes, and return the checkpoint with it."""
        file = self._session.new_scratch("healed") / "healed.safetensors"
        trained = student.trained_tensors()
        if parallel.is_first():
            write_trained(file, trained, checkpoint.source.specs)
        parallel.barrier()
        healed = self.with_files(checkpoint, [file])
        if healed.embedder is None:
            return healed
        return replace(healed, embedder=healed.embedder.with_weights(student.trained_behind()))

    def better(self, old: Checkpoint, new: Checkpoint, data: HealingData) -> Checkpoint:
        """Return the checkpoint that is better on the texts that were held out, as it would be saved."""
        return new if regret(self._validated(new, data), self._validated(old, data)) < 0 else old

    def _validated(self, checkpoint: Checkpoint, data: HealingData) -> dict[str, float]:
        model = self._session.stream(checkpoint)
        return {name: window_losses(model, text, self._session.settings).mean for name, text in data.texts.items()}


def write_trained(file: Path, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Write tensors in the dtypes of a checkpoint. Raises `LayerSurgeryError` if the file cannot be written."""
    stored = {name: tensor.detach().to("cpu", specs[name].dtype).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, file)
    except (OSError, SafetensorError) as error:
        raise LayerSurgeryError(
            f"the healed tensors cannot be written to {file.parent} ({error}); is the disk full?"
        ) from error


def unhealed_record(evaluator: Evaluator) -> UnhealedRecord:
    """Return what has been measured of the model from before healing, which is then forgotten."""
    record = UnhealedRecord(
        result=evaluator.result("unhealed"),
        comparison=evaluator.compare("before", "unhealed"),
        gain=evaluator.compare("unhealed", "after", distance=False),
    )
    evaluator.forget("unhealed")
    return record
