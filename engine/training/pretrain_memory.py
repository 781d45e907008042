"""How much memory a rank of a pretraining run takes when it holds most, term by term, for each engine and stage.

Knows what the engines hold and when: ours, and DeepSpeed's (0.19.8; its file is named at each term). Does not know
data, or what a part's passes take: that is measured (`pretrain_pass.py`) and handed in.

DeepSpeed's own estimators (`zero.estimates`) count bfloat16 weights with float32 masters at stages 2 and 3: there, and
where stage 3 gathers no more than one layer, weights, masters, moments and gradients here are theirs
(tests/engine/test_pretrain_memory.py). For float32 weights they are not true (half the bytes of weights and of
gradients are missing), nor for stages 0 and 1, and of twin, queue, copies, buckets, activations, libraries and what a
save gathers they know nothing.
"""

from miss.engine.training.pretrain_pass import Pass
from miss.engine.training.pretrain_plan import STAGES, Setting, Sizes

TERMS = (
    *("process", "weights", "masters", "moments", "twin", "queue", "copies", "pairs", "heap", "gathered", "gradients"),
    *("buckets", "large", "saved"),
)
_FALLBACK_BUCKET = 500_000_000  # numbers: engine.py MEMORY_OPT_ALLREDUCE_SIZE, what stage 0 flattens at once
_LIVE = 1_000_000_000  # numbers: zero/config.py stage3_max_live_parameters and stage3_max_reuse_distance
_CHUNK = 1 << 26  # numbers: zero.py gathers so many at once for the twin

Terms = dict[str, int]


def rank_memory(sizes: Sizes, stage: str, setting: Setting, one: Pass) -> tuple[str, Terms]:
    """When a rank (the first, which saves) holds most, and its bytes then by what they are for. The heap of a pass
    stays at all times: `large` and what else is named are blocks beside it."""
    number = STAGES.index(stage) - 1
    held = _held(sizes, number, setting, one)
    moments = {
        "backward": _backward(sizes, number, setting, one),
        "averaging": _averaging(sizes, number, setting, one),
        "update": _update(sizes, number, setting),
        "saving": _saving(sizes, number, setting, one),
    }
    when = max(moments, key=lambda name: sum(moments[name].values()))
    return when, {name: held.get(name, 0) + moments[when].get(name, 0) for name in TERMS}


def _held(sizes: Sizes, number: int, setting: Setting, one: Pass) -> Terms:
    """From the first update on, always.

    weights: whole; stage 3 each rank's piece (stage3.py lp_param_buffer). masters: float32, a piece each, from stage 1
    on (stage_1_and_2.py single_partition_of_fp32_groups; stage3.py fp32_partitioned_groups_flat), for float32 weights,
    too: it clones them even there. moments: AdamW's two. copies: the whole float32 model for validation and export
    where the engine keeps none (`setup.copy_of`), the moving average, and what is not trained, as it was (`zero.py`
    _frozen, `pretrain_task.py` _frozen).
    """
    halves = setting.bf16 and number >= 1
    width, share = 2 if halves else 4, setting.ranks if number >= 1 else 1
    frozen = 4 * sizes.twin_frozen + (4 * (sizes.total - sizes.trained) if number >= 0 else 0)
    whole = 4 * sizes.total if number == 3 or halves else 0
    return {
        "process": one.process + (setting.library if number >= 0 else 0),
        "weights": width * sizes.total // (setting.ranks if number == 3 else 1),
        "masters": 4 * sizes.trained // share if number >= 1 else 0,
        "moments": round((2 + 2 * 4 / 256 if setting.eight_bits else 8) * sizes.trained) // share,
        "twin": 4 * sizes.twin,
        "queue": sizes.queue_bytes,
        "copies": whole + frozen + (4 * sizes.trained if setting.average else 0),
        "pairs": setting.pairs + setting.remembered,
        "heap": one.heap,
        **_lasting(sizes, number, setting),
    }


def _lasting(sizes: Sizes, number: int, setting: Setting) -> Terms:
    """Of gradients and buckets, what stays from step to step: stage 3's flat pieces of gradients and its bucket
    (stage3.py grad_partitions_flat_buffer, IPG buffer); with halves at stage 1 whole float32 gradients
    (bf16_optimizer.py fp32_groups_gradients_flat)."""
    width = 2 if setting.bf16 else 4
    if number == 3:
        return {"gradients": 4 * sizes.trained // setting.ranks, "buckets": width * setting.bucket}
    if number == 1 and setting.bf16:
        return {"gradients": 4 * sizes.trained}
    return {}


def _backward(sizes: Sizes, number: int, setting: Setting, one: Pass) -> Terms:
    """While activations go and gradients come.

    Whole gradients stay with plain, stages 0 and 1. At stage 2 each moves into a bucket and then, its rank's piece,
    into `grads_in_partition`; at stage 3 into the flat pieces that are there already. Beside the bucket stands its
    flattened copy while it is sent (stage_1_and_2.py allreduce_bucket; reduce_scatter_coalesced), or the largest
    gradient's, which fits no bucket. At stage 3 weights that come again within `stage3_max_reuse_distance` stay
    gathered; one rank gathers nothing (partition_parameters.py _no_gather_coalesced).
    """
    halves = setting.bf16 and number >= 1
    width = 2 if halves else 4
    found = {"large": one.large(0.0)}
    if number < 2:
        found["gradients"] = one.large(width / 4) - found["large"]
    elif number == 2:
        found["gradients"] = 4 * sizes.trained // setting.ranks
    if number >= 2:
        found["buckets"] = width * max(setting.bucket, sizes.largest)
    if number in (1, 2) and not (halves and number == 1):
        found["buckets"] = found.get("buckets", 0) + width * setting.bucket
    if number == 3 and setting.ranks > 1:
        found["gathered"] = width * min(sizes.total, _LIVE)
    return found


def _averaging(sizes: Sizes, number: int, setting: Setting, one: Pass) -> Terms:
    """After the last part, with all gradients (the small ones in the heap): plain and stage 0 have them in one piece
    beside themselves (`plain.py`; engine.py allreduce_bucket, on one rank, too). Stage 1 has its piece, and buckets or
    the largest one on their way to it."""
    gradients = one.curve[-1][1]
    if number == -1:
        return {"gradients": gradients + (4 * sizes.trained if setting.ranks > 1 else 0)}
    if number == 0:
        return {"gradients": gradients, "buckets": 4 * min(sizes.trained, _FALLBACK_BUCKET)}
    if number == 1 and not setting.bf16:
        piece = 4 * sizes.trained // setting.ranks
        return {"gradients": gradients + piece, "buckets": 4 * (setting.bucket + max(setting.bucket, sizes.largest))}
    return {}


def _update(sizes: Sizes, number: int, setting: Setting) -> Terms:
    """The rank's pieces of gradients, and those of the largest group once more in one piece (step of both files), or
    the largest parameter's in float64 for the norm (get_norm_dtype). Then, for the twin, whole float32 values: of a
    group of halves (`zero.py` _whole), of stage 3 so many at once."""
    if number < 1:
        return {}
    once_more = max(4 * sizes.group, 8 * sizes.largest) // setting.ranks
    found = {"gradients": once_more + (4 * sizes.trained // setting.ranks if number < 3 else 0)}
    if number == 3 and setting.ranks > 1:
        gathered = {"gathered": 4 * min(sizes.total, _CHUNK)}
    else:
        gathered = {"gathered": 4 * sizes.group if setting.bf16 and number < 3 else 0}
    return max(found, gathered, key=lambda terms: sum(terms.values()))


def _saving(sizes: Sizes, number: int, setting: Setting, one: Pass) -> Terms:
    """Whole and apart on the first rank: moments (`plain.py` whole_state) and, of DeepSpeed's, weights (`zero.py`
    weights), with a group, or a parameter at stage 3, gathered. Small ones fill the heap before it grows."""
    times = (2 + 2 * 4 / 256 if setting.eight_bits else 8) + (4 if number >= 0 else 0)
    gathered = sizes.group if number in (1, 2) else sizes.largest if number == 3 else 0
    small = round(times * (sizes.trained - sizes.large))
    return {
        "saved": round(times * sizes.large) + max(0, small - one.heap),
        "gathered": 4 * gathered if setting.ranks > 1 else 0,
    }
