"""sentence-transformers makes an embedding, by default of causal models the last hidden state of the last token."""

import torch
from cells import PROMPTS, Case, main, same
from sentence_transformers import SentenceTransformer
from transformers import AutoModel


@torch.no_grad()
def embedded(case: Case) -> str:
    options = {"dtype": torch.float32}
    encoder = SentenceTransformer(case.directory, trust_remote_code=True, device="cpu", model_kwargs=options)
    found = encoder.encode(PROMPTS, batch_size=1, convert_to_tensor=True)
    decoder = AutoModel.from_pretrained(case.directory, trust_remote_code=True, **options).eval()
    tokenizer = case.tokenizer()
    states = [decoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state for prompt in PROMPTS]
    return same(found, torch.stack([state[0, -1] for state in states]))


if __name__ == "__main__":
    main({"sentence_transformers": embedded})
