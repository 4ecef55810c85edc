"""Healing as a stage of a run, of a compression or of a saved result."""

from layer_surgery.runs.healing.prepare import PreparedHealing, prepare_healing
from layer_surgery.runs.healing.results import unhealed_record
from layer_surgery.runs.healing.stage import Healed, heal

__all__ = ["Healed", "PreparedHealing", "heal", "prepare_healing", "unhealed_record"]
