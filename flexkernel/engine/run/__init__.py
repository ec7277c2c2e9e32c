"""One run on this rank: the forward, its hooks, edits and gradients."""
