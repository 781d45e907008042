"""Minutes on a GPU turned into evidence: the suite, its parts, and what brings their results home."""
