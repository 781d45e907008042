"""One of the processes of `test_pretrain_ranks.py`: every case of `miss pretrain` runs in one process group.

    python -m tests.engine.pretrain_worker PLACE RESULTS CASE…

with RANK, WORLD_SIZE, … set as torchrun sets them. RESULTS gets {case: null or the traceback} of this rank.
"""

import contextlib
import io
import json
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from miss.cli import pretrain
from miss.engine.training import trainer as trainer_module
from miss.engine.training.checkpoint import CheckpointStore
from miss.engine.training.log import read_log
from miss.engine.training.pretrain import load_model
from miss.engine.training.pretrain_pairs import read_pairs
from miss.engine.training.pretrain_validation import PairValidation
from miss.engine.training.ranks import Ranks
from tests.engine.tiny_pairs import tiny_pretrain_config

EXACT = {"model": {"dropout": 0.0, "attention_dropout": 0.0}, "losses": {"negatives_among": 4}}


def command(place, output, ranks, *flags, config="config.yaml"):
    """`miss pretrain` with this process group; what it prints."""
    argv = ["--config", str(place / config), "--output", str(output), "--json", *flags]
    args = pretrain.read_args(argv, "miss pretrain")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert pretrain.train(args, Path(output), ranks) == 0
    return out.getvalue()


def saved(output):
    folder = CheckpointStore(Path(output) / "checkpoints").newest()
    return {f"{p.name}:{k}": t for p in folder.glob("*.safetensors") for k, t in load_file(p).items()}


def losses(output):
    return [line["loss"] for line in read_log(Path(output) / "log.jsonl") if line["kind"] == "train"]


def figures(output):
    """What each validation gave."""
    lines = [line for line in read_log(Path(output) / "log.jsonl") if line["kind"] == "validation"]
    return [{k: v for k, v in line.items() if k.startswith(("loss", "matched", "recall"))} for line in lines]


def exact_resume(ranks, place):
    """ZeRO-2: 6 steps are 3 steps, a new start, 3 steps, bit for bit; only rank 0 prints."""
    whole, parts = place / "whole", place / "parts"
    printed = command(place, whole, ranks, "--zero", "2")
    assert bool(printed) == ranks.first
    command(place, parts, ranks, "--zero", "2", "--max-steps", "3")
    torch.manual_seed(999)
    command(place, parts, ranks, "--zero", "2")
    if ranks.first:
        a, b = saved(whole), saved(parts)
        assert a.keys() == b.keys() and "memory.safetensors:queue.pointer" in a
        assert not [name for name in a if not torch.equal(a[name], b[name])]
        assert losses(whole) == losses(parts) and len(losses(whole)) == 6
        assert json.loads(printed)["step"] == 6


def seconds_add_up(ranks, place):
    """Compute, communication, data, validation and checkpoint are the wall time, and ranks did talk."""
    if ranks.first:
        summary = json.loads((place / "whole" / "summary.json").read_text())
        assert abs(sum(summary["spent"].values()) - summary["seconds"]) < 0.3
        assert summary["spent"]["communication"] > 0 and summary["spent"]["checkpoint"] > 0
        lines = [line for line in read_log(place / "whole" / "log.jsonl") if line["kind"] == "train"]
        for line in lines:
            parts = [line[f"{kind}_s"] for kind in ("compute", "communication", "data")]
            assert min(parts[:2]) > 0 and abs(sum(parts) - line["s_per_step"]) < 1e-6


def shared_validation(ranks, place):
    """One rank's figures bit for bit, whether the parts divide, do not, lack a pair, or leave a rank without any."""
    found = {}
    torch.manual_seed(5 + ranks.rank)
    for batch_pairs, count in ((4, 16), (4, 19), (5, 21), (8, 3), (2, 3)):
        values = {"data": {"corrupt_share": 0.5}, "losses": {"mlm": 0.5}, "validation": {"batch_pairs": batch_pairs}}
        config = tiny_pretrain_config(place, **values)
        pairs = read_pairs(config.data)
        torch.manual_seed(1)
        model, processor = load_model(config, lambda text: None)
        model.eval()
        torch.manual_seed(ranks.rank)
        before = torch.get_rng_state()
        validation = PairValidation(pairs[:count], processor, config, ranks.device, ranks)
        figures = validation(model)
        assert torch.equal(torch.get_rng_state(), before)
        assert figures == validation(model), "the same every time"
        assert ranks.gather_objects(figures) == [figures] * ranks.world_size
        assert {"loss", "loss_itc", "loss_itm", "loss_lm", "loss_mlm", "matched", "recall"} <= figures.keys()
        if ranks.world_size == 2:  # nobody looks at what is another's
            counts = ranks.gather_objects([len(keys) for keys in validation.step.keys])
            parts = -(-count // batch_pairs)
            assert [len(own) for own in counts] == [(parts + 1) // 2, parts // 2] and sum(map(sum, counts)) in (
                count,
                count - 1,
            )
        found[f"{batch_pairs} {count}"] = figures
    path = place / "validation.json"
    if ranks.world_size == 1:
        path.write_text(json.dumps(found))
    else:
        assert json.loads(path.read_text()) == found


def same_order(ranks, place):
    """Without dropout, and with negatives drawn among 4, two ranks take one rank's steps: the same losses to 2e-5 and
    weights, twin and queue to 5e-6 where weights move by 1e-2 (docs/zero.md says why not bitwise), with any engine."""
    one = place / "one"
    for flags in ([], ["--zero", "2"], ["--zero", "3"]):
        output = one if ranks.world_size == 1 else place / f"two{'-'.join(flags)}"
        command(place, output, ranks, *flags, config="exact.yaml")
        if ranks.world_size == 1:
            return
        if ranks.first:
            a, b = saved(one), saved(output)
            names = [n for n in a if n.startswith(("model", "memory")) and n != "memory.safetensors:queue.ids"]
            worst = max((a[n].double() - b[n].double()).abs().max().item() for n in names)
            assert worst < 5e-6, (flags, worst)
            assert torch.equal(a["memory.safetensors:queue.ids"], b["memory.safetensors:queue.ids"])
            assert max(abs(x - y) for x, y in zip(losses(one), losses(output), strict=True)) < 2e-5, flags
            (before,), (now,) = (figures(folder) for folder in (one, output))
            assert before.keys() == now.keys() and max(abs(before[n] - now[n]) for n in before) < 2e-5, flags


def other_stages(ranks, place):
    """Exact resume at the other stages, and in bfloat16, too."""
    for flags in (["--zero", "1"], ["--zero", "3"], ["--zero", "2", "--bf16", "true"], []):
        name = "".join(flags).replace("-", "") or "plain"
        command(place, place / f"{name}-whole", ranks, *flags)
        command(place, place / f"{name}-parts", ranks, *flags, "--max-steps", "3")
        command(place, place / f"{name}-parts", ranks, *flags)
        if ranks.first:
            a, b = saved(place / f"{name}-whole"), saved(place / f"{name}-parts")
            assert a.keys() == b.keys() and not [n for n in a if not torch.equal(a[n], b[n])], name


def main() -> None:
    place, results = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    trainer_module.draw_curves = lambda *arguments: None  # a second a run, and nothing here looks at them
    with Ranks.from_environment("cpu", timeout=60) as ranks:
        for case in sys.argv[3:]:
            started = time.perf_counter()
            try:
                globals()[case](ranks, place)
                failure = None
            except Exception:
                failure = traceback.format_exc()
            found[case] = {"failure": failure, "seconds": round(time.perf_counter() - started, 2)}
            if not ranks.all_true(failure is None):
                break  # the others may be anywhere
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
