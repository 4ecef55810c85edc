"""Memory and scratch files of every stage, from sizes alone.

Counted is what is of the size of weights, of hidden states, of moments and of logits at the moment when a stage holds
most; the numbers of copies are those of the code that they name. What the process has when it begins is measured.
"""

from __future__ import annotations

from layer_surgery.calibration.statistics import useful_rank
from layer_surgery.linalg.decomposition import takes_leading
from layer_surgery.runs.foresight.sizes import LayerSizes, Sizes
from layer_surgery.walk.walk import LOGITS_AT_A_TIME

Parts = dict[str, int]
#: Logits and what a loss makes of them, forward and with gradients; float64 for two models in `evaluation/distance.py`.
_LOGITS, _LOGITS_BACK = 2, 4
#: Tensors as wide as the widest linear that a pass holds at a time: input, two products and their sum.
_FORWARD = 4
#: float64 matrices of the larger side in `linalg/low_rank.py` (moments, Cholesky factors, eigenvectors, workspace) and
#: in `linalg/leading.py` (never more than three).
_EXACT, _LEADING = 7, 3

#: Parts that are there for a whole stage, beside those that come and go.
_LASTING = (
    *("weights", "hidden states", "the student", "the original", "states of the original", "weights of the original"),
    *("kept for gradients", "what is trained", "gradients' moments"),
)


def kept_by_allocator(parts: Parts, sizes: Sizes, *, given_back: bool) -> Parts:
    """Return what the C library keeps of what a stage frees, until the stage ends: about as much as it works with.

    Of models whose layers stay, on a CPU; for others, large blocks are mapped one by one (`machine.map_large_blocks`).
    """
    working = sum(size for name, size in parts.items() if name not in _LASTING)
    return {"freed and kept": working} if given_back and sizes.stay else {}


def evaluation(sizes: Sizes, *, compared: bool) -> Parts:
    """Return the memory of measuring one model; `compared` with the hidden states of another."""
    stream = max((sizes.boundaries(2, *text)[0] for text in sizes.texts), default=0)
    waiting = _waiting(sizes)  # behind the second model, those of both
    logits = _LOGITS * _logits(sizes, 4) + (2 * _logits(sizes, 4) if compared else 0)
    return {
        "weights": sizes.layer_bytes,
        "hidden states": stream + waiting * (2 if compared else 1),
        "activations": max(_forward(sizes), logits),
    }


def statistics(sizes: Sizes) -> Parts:
    """Return the memory of one walk forward and backward with the decompositions of every layer."""
    kept = _kept(sizes, sizes.calibration)
    gradient = sizes.boundaries(2, sizes.calibration, sizes.length)[0]
    back = sizes.batch_tokens * max(layer.widths for layer in sizes.layers) * sizes.dtype.itemsize * 2
    working = max(max(4 * layer.moment_elements + max(back, _decomposed(sizes, layer)) for layer in sizes.layers), 0)
    return {
        "weights": sizes.layer_bytes,
        "hidden states": kept + gradient + _waiting(sizes),
        "moments and decompositions": max(working, _LOGITS_BACK * _logits(sizes, 4)),
    }


def refit(sizes: Sizes) -> Parts:
    """Return the memory of the refit: both models, and the sums of the largest group of linears."""
    stream = sizes.boundaries(1, sizes.calibration, sizes.length)[0]
    general = _kept(sizes, sizes.general) + sizes.boundaries(1, sizes.general, sizes.length)[0] if sizes.general else 0
    sums = 0
    for layer in sizes.layers:
        for group in layer.groups or ((),):
            in_ = max((layer.linears[name][1] for name in group), default=0)
            products = sum(layer.linears[name][0] * in_ for name in group)
            wide = takes_leading(sizes.decomposition, in_)
            solved = 8 * ((3 if wide else 5) * in_**2 + 3 * max((layer.linears[n][0] for n in group), default=0) * in_)
            sums = max(sums, 2 * 4 * (in_**2 + products) + solved)
    return {
        "weights": 2 * sizes.layer_bytes + sizes.outside * sizes.dtype.itemsize,
        "hidden states": _kept(sizes, sizes.calibration) + stream + general + _waiting(sizes),
        "sums and solutions": max(sums + 2 * _forward(sizes), _LOGITS * _logits(sizes, 4)),
    }


def forward(sizes: Sizes) -> Parts:
    """Return the memory of walks that keep their boundaries and decompose one linear at a time."""
    decomposed = max((_decomposed(sizes, layer) for layer in sizes.layers), default=0)
    return {
        "weights": sizes.layer_bytes,
        "hidden states": _kept(sizes, sizes.calibration) + _waiting(sizes),
        "moments and decompositions": max(decomposed, _forward(sizes), _LOGITS * _logits(sizes, 4)),
    }


def components_bytes(sizes: Sizes) -> int:
    """Return the scratch files of the components of all linears, up to the largest useful rank, as stored."""
    return sizes.stored_itemsize * sum(
        useful_rank(size) * sum(size) for layer in sizes.layers for size in layer.linears.values()
    )


def boundary_files_bytes(sizes: Sizes) -> int:
    """Return the scratch files of the boundaries that are not in memory."""
    sequences = (sizes.calibration, sizes.general)
    return sum(sizes.boundaries(len(sizes.layers) + 1, count, sizes.length)[1] for count in sequences if count)


def _kept(sizes: Sizes, sequences: int) -> int:
    return sizes.boundaries(len(sizes.layers) + 1, sequences, sizes.length)[0]


def _waiting(sizes: Sizes) -> int:
    """Return the last hidden states of the original that wait in memory for the result (`runs/evaluator.py`)."""
    most = sizes.boundary_bytes // 4 // (2 * max(1, len(sizes.texts)))
    slots = (sizes.slot_bytes(*text) for text in sizes.texts)
    return sum(slot for slot in slots if slot <= most)


def _logits(sizes: Sizes, itemsize: int) -> int:
    """Return the bytes of the logits that exist at a time."""
    return min(max(sizes.batch_tokens, 1) * sizes.vocabulary, LOGITS_AT_A_TIME) * itemsize


def _forward(sizes: Sizes) -> int:
    widest = max((max(map(max, layer.linears.values()), default=0) for layer in sizes.layers), default=0)
    return _FORWARD * sizes.batch_tokens * max(widest, sizes.hidden) * sizes.dtype.itemsize


def _decomposed(sizes: Sizes, layer: LayerSizes) -> int:
    """Return the memory of decomposing the linear of a layer that takes most."""
    most = 0
    for out, in_ in layer.linears.values():
        large, small = max(out, in_), min(out, in_)
        copies = _LEADING if takes_leading(sizes.decomposition, out, in_) else _EXACT
        most = max(most, 8 * (copies * large**2 + 4 * large * small))
    return most
