"""The package is described in pyproject.toml; compiled kernels (csrc/) will be built from here once there are any."""

from setuptools import setup

setup()
