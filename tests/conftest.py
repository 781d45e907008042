"""Every test draws the same random tensors each time, and what Hypothesis finds can be found again."""

import hypothesis
import torch


class TorchRandom:
    """PyTorch's generator as Hypothesis wants one, so that it seeds it for every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


RANDOM = TorchRandom()  # Hypothesis keeps a weak reference
hypothesis.register_random(RANDOM)  # type: ignore[arg-type]


# Minutes each. Begun last, as xdist does with files of few tests, they would run on alone beside an idle processor.
LONG = (
    "test_triton.py",
    "test_rank_faults.py",
    "test_zero.py",
    "test_pretrain_ranks.py",
    "test_gpu_suite.py",
    "test_serve.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_runtest_setup(item):
    torch.manual_seed(0)
