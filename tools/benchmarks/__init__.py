"""What this costs beside what it would be done with otherwise: `make bench`, `make bench
ROWS="reads edit"`."""
