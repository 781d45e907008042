"""Whole answers on each device at hand, against the CPU one request at a time; on a GPU (`-m gpu`) with what no CPU
has: captured graphs and their budget, the second stream, flags in page-locked memory.

Does not know what the parts do (test_ahead.py). Its CUDA half was never run here.
"""

import pytest
import torch

from miss import Engine, SamplingParams
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.graphs import Graphs
from tests.engine.answering import write_checkpoint, write_images
from tests.helpers import DEVICES

WAYS = (
    SamplingParams(num_alternatives=0),
    SamplingParams(num_alternatives=2),
    SamplingParams(num_beams=2, num_alternatives=0),
    SamplingParams(temperature=0.9, top_p=0.8, seed=4, num_alternatives=0),
    SamplingParams(constrain=("heart", "left lung", "lung"), num_alternatives=0),
    SamplingParams(candidates=("heart", "left lung"), num_alternatives=1),
)
QUESTIONS = ("which organ is shown?", "lung", "is there a fracture in the left lung?")
ASKED = [(i % 3, i // 3 % 3, i % len(WAYS)) for i in range(18)]  # image, question, way
SMALL = {"answer_slots": 8, "question_slots": 3, "refill_share": 0.0, "cache_bytes": 1 << 16}
CONFIGS = {
    "as it is": EngineConfig(cache_bytes=1 << 16),
    "graphs": EngineConfig(**SMALL, fill_up=True, steps_ahead=4),
    "no graphs": EngineConfig(**SMALL, fill_up=True, steps_ahead=4, graph_bytes=0),
    "graphs in a few bytes": EngineConfig(**SMALL, fill_up=True, steps_ahead=4, graph_bytes=4096),
    "step by step": EngineConfig(**SMALL, fill_up=False, steps_ahead=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    path = tmp_path_factory.mktemp("devices")
    write_checkpoint(path / "model", vocabulary)
    return path


@pytest.fixture(scope="module")
def truth(folder):
    engine, images = Engine.load(folder / "model", precision="fp32"), write_images(folder)
    return {(i, q, w): engine.answer(images[i], QUESTIONS[q], WAYS[w]) for i, q, w in ASKED}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", CONFIGS)
def test_answers_are_those_of_one_at_a_time_on_the_cpu(folder, truth, config, device):
    """Twice: what was captured, and the images that were kept, serve the second round. New requests come while others
    are under way."""
    engine = Engine.load(folder / "model", precision="fp32", device=device, config=CONFIGS[config])
    images = write_images(folder)
    for _ in range(2):
        requests = []
        for i, q, w in ASKED:
            requests.append(engine.add(images[i], QUESTIONS[q], WAYS[w]))
            if len(requests) % 5 == 0:
                engine.step()
        while engine.busy:
            engine.step()
        for request, one in zip(requests, ASKED, strict=True):
            assert request.error is None
            assert (request.answer.text, request.answer.token_ids) == (truth[one].text, truth[one].token_ids), one
            assert request.answer.logprob == pytest.approx(truth[one].logprob, abs=1e-3)
    graphs = engine.runner.graphs
    assert graphs.bytes <= max(graphs.budget, 0)
    captures = device == "cuda" and CONFIGS[config].fill_up is not False and config != "no graphs"
    if captures and config != "graphs in a few bytes":
        assert graphs.num_captured > 0
    if not captures:
        assert graphs.num_captured == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_program_runs_once_a_call_and_reads_its_tensors_anew(device):
    graphs = Graphs(torch.device(device), 1 << 24)
    x, y = torch.zeros(4, device=device), torch.ones(4, device=device)
    owner, run = graphs.program("add", lambda: (x, lambda: x.add_(y)))
    for value in (1.0, 5.0):
        before = x.clone()
        y.fill_(value)
        run()
        assert owner is x and torch.equal(x, before + value)
    assert graphs.num_captured == (device == "cuda")
