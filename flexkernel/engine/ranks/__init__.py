"""The ranks together: their mesh, their exchanges, how a stuck one is broken off and brought
back."""
