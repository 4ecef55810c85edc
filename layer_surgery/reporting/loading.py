"""How a result is loaded, for the page and the card."""

from __future__ import annotations

import json


def how_to_load(name: str, *, needs_code: bool) -> str:
    """Return Python that loads the result in the directory or repository `name`.

    Args:
        needs_code: whether it loads with `trust_remote_code=True` only (it has low-rank layers).
    """
    # The tokenizer too: transformers looks at the configuration first, and asks on the terminal whether to trust it.
    where = json.dumps(name, ensure_ascii=False)
    remote = ", trust_remote_code=True" if needs_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({where}, dtype="auto"{remote})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({where}{remote})"
    )
