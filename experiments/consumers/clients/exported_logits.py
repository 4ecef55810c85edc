"""What exporters share: a model as a function of its tokens alone."""

from typing import Any

import torch


class Logits(torch.nn.Module):
    """Map token ids [batch, tokens] to logits, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=token_ids, use_cache=False).logits
        return logits
