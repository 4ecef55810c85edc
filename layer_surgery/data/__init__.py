"""Calibration and evaluation data: from a file, a hub data set or the bundled text to packed tokens."""

from __future__ import annotations

from layer_surgery.data.bundled import bundled_tasks
from layer_surgery.data.documents import Chat, Document, Example, Kind, LoadedData, Part, Text
from layer_surgery.data.mixture import pack_mixture
from layer_surgery.data.packing import check_vocabulary, pack_calibration, pack_evaluation
from layer_surgery.data.sources import known_sources, load_documents
from layer_surgery.data.weights import WeightedSource, weighted_sources

__all__ = [
    "Chat",
    "Document",
    "Example",
    "Kind",
    "LoadedData",
    "Part",
    "Text",
    "WeightedSource",
    "bundled_tasks",
    "check_vocabulary",
    "known_sources",
    "load_documents",
    "pack_calibration",
    "pack_evaluation",
    "pack_mixture",
    "weighted_sources",
]
