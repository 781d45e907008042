"""A barrier of all programs of a grid, again and again: what one costs bounds every kernel that would decode alone.

Knows Triton; does not know operations, which is why it stands here and not in kernels/: no model ever calls it.
Compiled for sm_80 and sm_90, never run on a GPU. The interpreter cannot run it: it takes programs one after another.
"""

import torch
import triton
import triton.language as tl

WARPS = 4


@triton.jit(do_not_specialize=["PROGRAMS", "ROUNDS"])  # else multiples of 16 and 1 are compiled anew, within a timing
def barriers(counter, PROGRAMS, ROUNDS):
    """Every program adds one and waits until all have, ROUNDS times. counter: int32, 0 before."""
    for turn in range(ROUNDS):
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        goal = (turn + 1) * PROGRAMS
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < goal:
            pass
        tl.debug_barrier()


def seconds(programs: int, rounds: int) -> float:
    """Of one launch. Launched cooperatively: all programs are on the device at once, or it is refused."""
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    barriers[(programs,)](counter, programs, rounds, num_warps=WARPS, launch_cooperative_grid=True)
    end.record()
    end.synchronize()
    if int(counter.item()) != programs * rounds:
        raise RuntimeError(f"the barrier counted {int(counter.item())}; wanted {programs * rounds}")
    return float(start.elapsed_time(end)) / 1e3
