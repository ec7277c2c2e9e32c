"""A model on this rank: loaded, scanned and called."""
