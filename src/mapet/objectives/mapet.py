"""MaPeT: masked and permuted visual token prediction (arXiv 2306.07346)."""

from __future__ import annotations

from mapet.objectives.permuted import PermutedObjective


class MaPeT(PermutedObjective):
    """Masked and permuted pre-training, Section 3 of the paper.

    For a random order ``z`` of the ``N`` tokens whose first ``c`` are the context, maximise

        sum over t > c of  log p(id[z_t] | content z_1..z_{t-1}, positions z_t..z_N)

    - *Permuted*: target ``t`` is predicted from the context and all targets visited before it, so targets
      depend on each other, which masked image modelling ignores.
    - *Masked*: the positions not yet visited stay visible as mask vectors, so every row sees each of the
      ``N`` positions exactly once, as after pre-training, which permuted modelling alone does not give.

    Three groups of rows go through the same weights (two-stream attention):

    ========================== ============================== ==============================================
    rows                       input                          sees
    ========================== ============================== ==============================================
    content, context (c)       patch + position               context, all position slots
    content, target t (T)      patch + position               context, content of targets <= t, slots > t
    position slots (T)         mask vector + position         context, all position slots
    queries, target t (T)      mask vector + position         context, content of targets < t, slots >= t
    ========================== ============================== ==============================================

    A linear head on the query rows gives the logits. Afterwards the mask vector and the head are dropped:
    what remains is a plain ViT. The defaults are the paper's: 147 of 196 patches (75 %) are targets, all predicted.
    """

    sees_slots = True
