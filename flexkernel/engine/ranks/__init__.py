"""The ranks together: their mesh, their exchanges, and how a stuck collective is broken off and
recovered."""
