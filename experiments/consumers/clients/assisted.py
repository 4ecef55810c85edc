"""Assisted generation: the result drafts, the original decides, and the text is the original's."""

import torch
from cells import PROMPTS, Case, main

TOKENS = 32
#: Tokens that the draft proposes before each pass of the original.
DRAFTED = 4


def assisted(case: Case) -> str:
    """Return how many of the drafted tokens the original took."""
    draft, model, tokenizer = case.load(), case.load(case.original), case.tokenizer()
    draft.generation_config.num_assistant_tokens = DRAFTED
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    prompts = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    expected = [model.generate(**given, **options) for given in prompts]
    passes = 0

    def count(module: torch.nn.Module, arguments: tuple[object, ...]) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_pre_hook(count)
    for given, tokens in zip(prompts, expected, strict=True):
        found = model.generate(**given, assistant_model=draft, **options)
        assert torch.equal(found, tokens), "the text is not the original's"
    # Each pass of the original gives one token of its own beside those of the draft that it takes.
    return f"{(TOKENS * len(PROMPTS) - passes) / (DRAFTED * passes):.0%}"


if __name__ == "__main__":
    main({"assisted": assisted})
