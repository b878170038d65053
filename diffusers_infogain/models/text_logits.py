"""stub"""

import torch

CACHES = ("none", "exact", "prefix")


class TextCache:
    def __init__(self, model, family, kind="none", packed=False):
        self.model = model

    def begin_block(self, sequences, attention_mask, start, end):
        self.s, self.m, self.a, self.b = sequences.clone(), attention_mask.clone(), start, end

    def logits(self, states, rows, where):
        s = self.s[rows]
        s[:, self.a : self.b] = states
        w = torch.zeros_like(s, dtype=torch.bool)
        w[:, self.a : self.b] = where
        return self.model(s, self.m[rows], where=w)
