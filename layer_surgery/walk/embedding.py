"""The loss of an embedding model against its teacher, and what stands for its gradient at the teacher itself.

With s_i and t_i the embeddings of text i by the model and by its teacher, of length 1, N texts and two weights `C`, `G`

    loss = C sum_i (1 - s_i.t_i)  +  G/N sum_ij (s_i.s_j - t_i.t_j)^2

the first two terms of Jasper and Stella (https://arxiv.org/abs/2412.19048, equations 1 and 2), summed over texts. At
the original both are zero, and so are their gradients; what changes cost is in the second derivative. Both are squares,
`1 - s.t = |s - t|^2 / 2`, so there it is that of Gauss and Newton: for changes d_i of the s_i

    loss = 1/2 ( C sum_i |d_i|^2  +  2G/N |D S^T + S D^T|^2 )  +  higher orders  =  1/2 |J d|^2

with S and D the matrices of all s_i and d_i: the second part is the differential of the matrix of similarities. For
numbers `r` with mean 0, variance 1 and no correlation the gradient `g = J^T r` has `E[g g^T] = J^T J`: it is to this
loss what the gradient at a sampled label is to a cross-entropy, whose second moment is the Fisher information (Martens,
https://arxiv.org/abs/1412.1193). So everything that is made of squared gradients (metrics of linears, couplings of
layers) is of the second derivative of this loss. Unbiased, for the mean over draws of the signs.

The paper's third term, relative similarity, is a sum of hinges: it has no second derivative almost everywhere, and its
first is not zero at the original, where it would go on to separate pairs. It is a loss to train with (`healing`).

Shapes: N texts, E dimensions.
"""

from math import sqrt

import torch
from torch import Tensor

#: Weights of the cosine and of the similarity term, as in the paper.
COSINE, SIMILARITY = 10.0, 200.0


def embedding_losses(vectors: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of each text [N] float64, of embeddings and the teacher's, both [N, E] of any length.

    Where the two have other dimensions no cosine is between them, and the similarities alone are compared.
    """
    s, t = (torch.nn.functional.normalize(each.double(), dim=-1) for each in (vectors, teacher))
    similarity: Tensor = SIMILARITY * (s @ s.T - t @ t.T).pow(2).mean(dim=1)
    if s.shape != t.shape:
        return similarity
    # |s - t|^2 / 2 is 1 - s.t without its rounding, which is as large as what is measured near the teacher.
    cosine: Tensor = 0.5 * COSINE * (s - t).pow(2).sum(dim=1)
    return cosine + similarity


def curvature_probes(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Return `g = J^T r` by embedding (not of length 1), [N, E] float64, for random signs r of the generator's."""
    vectors = vectors.double()
    s = torch.nn.functional.normalize(vectors, dim=-1)
    count = len(s)
    alone = sqrt(COSINE) * _signs(s.shape, generator)
    pairs = _signs((count, count), generator)
    together = sqrt(2 * SIMILARITY / count) * (pairs + pairs.T) @ s
    g = alone + together
    # A change of a vector moves its direction by what of it is at right angles to it, over its length.
    lengths = vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (g - (g * s).sum(dim=-1, keepdim=True) * s) / lengths


def probe_generator(sha256: str) -> torch.Generator:
    """Return the generator of the signs for some texts: the same texts get the same."""
    return torch.Generator().manual_seed(int(sha256[:15] or "0", 16))


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator).double() * 2 - 1
