"""Where whole tensors lie: the plan of a run, the slabs that hold it, and numbers made where the
bytes are."""
