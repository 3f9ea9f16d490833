"""Embeddings: 1 - cosine with the teacher's, mean over the samples; 0 where both point the same way. There are no labels.

Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual", arXiv 2004.09813, section 2, with the angle in place of the squared distance,
since embeddings are compared by angle. (b, d).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from apportion.errors import TrainError
from apportion.vocab import Card


class Cosine(nn.Module):
    card = Card("Cosine with a teacher", "Reimers and Gurevych 2020", "2004.09813", None, exact=True, needs="training")

    def forward(self, student: Tensor, *, teacher: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        if teacher is None:
            raise TrainError("no teacher", wanted="the embedding of a teacher", do="Run the full path or a frozen network first.")
        return (1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()


METHOD = Cosine
