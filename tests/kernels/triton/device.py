"""Where Triton kernels run: in the interpreter on the CPU, else on the GPU, else nowhere."""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
INSTALLED = importlib.util.find_spec("triton") is not None
RUNS = INSTALLED and (INTERPRETED or torch.cuda.is_available())
