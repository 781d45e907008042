"""Captions for images that have labels only: labels -> prompts -> a writer -> cleaned captions with provenance."""
