"""Losses: each says how far the student is from its teacher, or from the text. Importing this registers all."""

# In the order in which help texts list them.
# isort: off
from layer_surgery.healing.losses import cross_entropy, divergences, decoupled, class_aware, stepping_stones
from layer_surgery.healing.losses import states, alignment, attention, vectors

# isort: on
from layer_surgery.healing.losses.inputs import (
    AttentionPair,
    RelationPair,
    StatePair,
    Stones,
    TeacherKind,
    TeacherLogits,
    TokenLogits,
    VectorPair,
)
from layer_surgery.healing.losses.registry import LOSSES, PER_TOKEN, LossEntry
