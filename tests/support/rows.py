"""Three prompts of unequal length, which every layout shares out unevenly: as lists, and as the
batch that the unsharded model takes."""

from __future__ import annotations

from tests.support import models

__all__ = ["BATCH", "MASK", "ROWS"]

BATCH = models.ids_and_mask([5, 7, 6])
ROWS = models.rows(BATCH)
MASK = BATCH["attention_mask"].bool()  # (3, 7): the real positions
