"""What options choose from by name, and what help texts and completion say of each.

It stands here, and not beside the functions that are registered under these names, because importing those takes
seconds. A function can only be registered under a name that is listed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A value that an option takes."""

    summary: str  #: One line.
    source: str = ""  #: URL of the paper, or "" where there is none.


_GRASP = "https://arxiv.org/abs/2501.00339"
_MODEGPT = "https://arxiv.org/abs/2408.09632"
_GFWSVD = "https://arxiv.org/abs/2505.17974"
_STELLA = "https://arxiv.org/abs/2412.19048"

SCORER_CHOICES: Mapping[str, Choice] = {
    "fisher": Choice(
        "predicted rise of the loss when layers are replaced by their best low-rank components, also jointly",
        "https://arxiv.org/abs/1412.1193",
    ),
    "block_influence": Choice(
        "1 - mean cosine of a layer's input and output (ShortGPT)", "https://arxiv.org/abs/2403.03853"
    ),
    "angular": Choice(
        "angular distance across a contiguous block of layers, at the last token", "https://arxiv.org/abs/2403.17887"
    ),
    "perplexity": Choice(
        "greedy: remove the layer whose removal raises the loss least, repeat (SLEB)",
        "https://arxiv.org/abs/2402.09025",
    ),
    "taylor": Choice(
        "sum of |weight x gradient| over a layer's linears (one backward walk)", "https://arxiv.org/abs/2402.02834"
    ),
    "last": Choice("the deepest layers but the final one"),
    "random": Choice("a seeded random order"),
}

METHOD_CHOICES: Mapping[str, Choice] = {
    "mix": Choice(
        "channels of MLPs and singular vectors of other linears by one search, and what else --components names",
        _MODEGPT,
    ),
    "fisher": Choice(
        "truncated SVD in the Kronecker-factored Fisher metric, ranks by one knapsack over all matrices", _GFWSVD
    ),
    "svd_llm": Choice(
        "truncated SVD that changes the outputs on the calibration data least (SVD-LLM)",
        "https://arxiv.org/abs/2403.07378",
    ),
    "svd": Choice("truncated SVD of each weight: the nearest in Frobenius norm; looks at no data"),
    "grasp": Choice("singular groups by |s * dLoss/ds|, all from one backward walk (GRASP's importance)", _GRASP),
    "grasp_sequential": Choice(
        "as grasp, recomputed after every replaced attention and MLP, last to first, as the paper does", _GRASP
    ),
    "replaceme": Choice(
        "remove; fold the best linear map for each removed run into the MLP before it (ReplaceMe)",
        "https://arxiv.org/abs/2505.02819",
    ),
    "laco": Choice(
        "remove; add the weight differences of each removed run to the layer before it (LaCo)",
        "https://arxiv.org/abs/2402.11187",
    ),
    "remove": Choice("remove the layers outright; nothing takes their place (--keep 0)"),
}

COMPONENT_CHOICES: Mapping[str, Choice] = {
    "channels": Choice("channels of MLPs", _MODEGPT),
    "singular": Choice("singular vectors of linears", _GFWSVD),
    "heads": Choice(
        "key/value heads with their queries, so that the KV cache shrinks (default with --target-kv-cache)", _MODEGPT
    ),
    "attention": Choice(
        "the whole attention of a layer, with its KV cache (default with --target-kv-cache and --target-time)"
    ),
    "mlp": Choice("the whole MLP of a layer (default with --target-time)"),
    "experts": Choice("channels of experts", _MODEGPT),
    "routed": Choice("whole experts, with their rows of the router", "https://arxiv.org/abs/2510.13999"),
    "bypass": Choice("a low-rank linear map in the place of an MLP", "https://arxiv.org/abs/2411.19146"),
}

LOSS_CHOICES: Mapping[str, Choice] = {
    "kl": Choice("KL(teacher || student): logit distillation", "https://arxiv.org/abs/1503.02531"),
    "reverse_kl": Choice(
        "KL(student || teacher): seeks the teacher's modes (MiniLLM)", "https://arxiv.org/abs/2306.08543"
    ),
    "skew_kl": Choice(
        "KL(teacher || mixture of both): bounded, steadier gradients (DistiLLM)", "https://arxiv.org/abs/2402.03898"
    ),
    "jsd": Choice("generalised Jensen-Shannon divergence (GKD)", "https://arxiv.org/abs/2306.13649"),
    "tvd": Choice(
        "total variation distance: half the sum of |teacher - student|", "https://github.com/arcee-ai/DistillKit"
    ),
    "ce": Choice("cross-entropy with the text itself, with label smoothing", "https://arxiv.org/abs/1512.00567"),
    "dkd": Choice(
        "decoupled distillation: the label, and the other tokens among themselves", "https://arxiv.org/abs/2203.08679"
    ),
    "clkd": Choice(
        "class-aware logit distillation: logits by token, by class, and correlations of classes",
        "https://arxiv.org/abs/2211.14773",
    ),
    "hidden": Choice("mean squared error of hidden states at pairs of layers", "https://arxiv.org/abs/1412.6550"),
    "cosine": Choice("1 - cosine of hidden states at pairs of layers", "https://github.com/arcee-ai/DistillKit"),
    "trajectory": Choice(
        "direction and step of the stream from one pair of layers to the next", "https://arxiv.org/abs/2412.19449"
    ),
    "cka": Choice(
        "1 - linear CKA of hidden states: relations between tokens, whatever the basis",
        "https://arxiv.org/abs/1905.00414",
    ),
    "local": Choice(
        "squared error of a block's outputs over their own mean square (Puzzle)", "https://arxiv.org/abs/2411.19146"
    ),
    "relations": Choice(
        "KL of relations among queries, keys and values of the last layer (MiniLMv2)",
        "https://arxiv.org/abs/2012.15828",
    ),
    "attention": Choice(
        "mean squared error of attention scores, masked places left out (TinyBERT); needs --both-models",
        "https://arxiv.org/abs/1909.10351",
    ),
    "stones": Choice(
        "block-wise logit distillation: stepping stones between student and teacher; needs --both-models",
        "https://arxiv.org/abs/2411.01547",
    ),
    "embedding_cosine": Choice("1 - cosine between a text's embeddings by both models (Jasper and Stella)", _STELLA),
    "embedding_similarity": Choice("mean squared error of the cosines between all texts of a step", _STELLA),
    "embedding_relative": Choice("pairs of texts in another order, by their cosines, than the original's", _STELLA),
}
DEFAULT_LOSSES = ("kl",)
#: Of embedding models, with the paper's weights; where vectors have fewer numbers than the original's, those but the
#: first.
DEFAULT_EMBEDDING_LOSSES = ("embedding_cosine:10", "embedding_similarity:200", "embedding_relative:20")

HEAD_CHOICES = ("auto", "embedding")
POOLING_CHOICES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

DATA_CHOICES: Mapping[str, Choice] = {
    "bundled": Choice("text that comes with Layer Surgery; needs no network"),
    "c4": Choice("English web pages, from the hub", "https://arxiv.org/abs/1910.10683"),
    "gsm8k": Choice("school mathematics with answers, from the hub", "https://arxiv.org/abs/2110.14168"),
    "wikitext2": Choice("articles of Wikipedia, from the hub", "https://arxiv.org/abs/1609.07843"),
}

#: Tasks that need no network: all of them, and each. lm-eval has thousands more.
BUNDLED_TASKS = (
    "bundled",
    "bundled_agreement",
    "bundled_pronouns",
    "bundled_verb_forms",
    "bundled_cloze",
    "bundled_copying",
    "bundled_partners",
)


def described(choices: Mapping[str, Choice], chosen: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield a row of a help text for each choice: its name, and whether it is `chosen` by default; what it is."""
    for name, choice in choices.items():
        yield name + (" (default)" if name in chosen else ""), f"{choice.summary} {choice.source}".strip()
