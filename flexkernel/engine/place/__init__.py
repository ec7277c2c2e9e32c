"""Where this rank's values go: placements, digests and copies into slabs."""
