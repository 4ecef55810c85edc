"""Losses: each says how far the student is from its teacher, or from the text. Importing this registers all."""

from layer_surgery.healing.losses.registry import LOSSES, LossEntry
