"""The learning rate as a pure function of the step.

Knows numbers; does not know optimisers or state: a resumed run needs nothing but the step.
"""

import math

from miss.engine.training.config import ScheduleConfig


def rate_share(step: int, config: ScheduleConfig) -> float:
    """The share of each group's rate that step `step` (from 0) is taken with.

    Linear from 1/warmup_steps to 1 over the warm-up's steps, then half a cosine that reaches `final_share` after the
    last step (arXiv 1608.03983 without restarts). Steps past `total_steps` stay at `final_share`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / (config.total_steps - config.warmup_steps))
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done))
