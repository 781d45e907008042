"""Fuzz targets: what reads strangers' bytes, a function each, fed by atheris or from a kept corpus."""
