"""Healing as a stage of a run, of a compression or of a saved result."""

from layer_surgery.runs.healing.prepare import PreparedHealing, prepare_healing
from layer_surgery.runs.healing.stage import Healed, heal, unhealed_record

__all__ = ["Healed", "PreparedHealing", "heal", "prepare_healing", "unhealed_record"]
