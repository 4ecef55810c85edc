"""CTranslate2's converter makes its format, and its logits are those of transformers."""

import ctranslate2
import numpy as np
import torch
from cells import TOKEN_IDS, Case, logits_of, main, same


def converted(case: Case) -> str:
    folder = str(case.scratch / "converted")
    ctranslate2.converters.TransformersConverter(case.directory, trust_remote_code=True).convert(folder)
    generator = ctranslate2.Generator(folder, device="cpu", compute_type="float32", intra_threads=1)
    words = case.tokenizer().convert_ids_to_tokens
    found = generator.forward_batch([words(row) for row in TOKEN_IDS.tolist()])
    return same(torch.from_numpy(np.array(found)), logits_of(case.load()))


if __name__ == "__main__":
    main({"ctranslate2": converted})
