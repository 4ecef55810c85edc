"""Calibration and evaluation data: from a file, a hub data set or the bundled text to packed tokens."""

from layer_surgery.data.bundled import bundled_tasks
from layer_surgery.data.documents import Chat, Example, LoadedData, Text
from layer_surgery.data.mixture import pack_at_most, pack_mixture
from layer_surgery.data.packing import check_vocabulary, pack_calibration, pack_evaluation
from layer_surgery.data.sources import known_sources, load_documents
from layer_surgery.data.weights import WeightedSource, weighted_sources
