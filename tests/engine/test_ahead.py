"""Going several steps ahead on the device: the same answers as step by step, whatever shares the batch; draws by the
host's rule; programs are made once, and dropped beyond their budget. On CPU all of it runs but the capture."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss import Engine, SamplingParams
from miss.engine.runtime.ahead import BUCKETS, Autopilot, Flight, Row, bucket_of
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.drawing import Cuts, draw_rows
from miss.engine.runtime.graphs import Graphs
from miss.engine.runtime.sampling import draw
from miss.engine.runtime.search import Ahead
from tests.engine.answering import write_checkpoint, write_images

WAYS = (
    SamplingParams(num_alternatives=0),
    SamplingParams(num_alternatives=2),
    SamplingParams(max_new_tokens=1, num_alternatives=1),
    SamplingParams(num_beams=2, num_alternatives=0),
    SamplingParams(temperature=0.9, seed=4, num_alternatives=0),
    SamplingParams(temperature=1.3, top_k=5, seed=1, num_alternatives=2),
    SamplingParams(temperature=0.7, top_p=0.8, seed=9, num_alternatives=1, max_new_tokens=3),
    SamplingParams(constrain=("heart", "left lung", "lung"), num_alternatives=0),
    SamplingParams(candidates=("heart", "left lung"), num_alternatives=1),
)
QUESTIONS = ("which organ is shown?", "lung", "is there a fracture in the left lung?")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("ahead")
    engine = Engine.load(write_checkpoint(folder / "model", vocabulary), precision="fp32")
    return engine.model, engine.processor, write_images(folder)


@pytest.fixture(scope="module")
def truth(parts):
    model, processor, images = parts
    engine, known = Engine(model, processor, config=EngineConfig(cache_bytes=0)), {}

    def alone(image, question, way):
        key = image, question, way
        if key not in known:
            known[key] = engine.answer(images[image], QUESTIONS[question], WAYS[way])
        return known[key]

    return alone


def answers(engine, asked, images):
    requests = [engine.add(images[i], QUESTIONS[q], WAYS[w]) for i, q, w in asked]
    while engine.busy:
        engine.step()
    return requests


asked = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, len(WAYS) - 1)), min_size=1, max_size=7)


@settings(deadline=None, max_examples=25)
@given(asked, st.integers(2, 9), st.booleans(), st.sampled_from([0, 1 << 16, 1 << 24]), st.integers(1, 3))
def test_the_same_answers_as_step_by_step(parts, truth, asked, steps, fill_up, cache_bytes, lead):
    """`lead` above 1, as on a GPU, launches steps before it is known that anybody wants them."""
    model, processor, images = parts
    config = EngineConfig(
        answer_slots=8, question_slots=3, steps_ahead=steps, fill_up=fill_up, cache_bytes=cache_bytes, refill_share=0.0
    )
    engine = Engine(model, processor, config=config)
    engine.runner._autopilot.lead = lead
    requests = answers(engine, asked, images)
    for request, one in zip(requests, asked, strict=True):
        assert request.error is None
        wanted, got = truth(*one), request.answer
        assert got.text == wanted.text and got.token_ids == wanted.token_ids
        assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert [other.text for other in got.alternatives] == [other.text for other in wanted.alternatives]
    stats = engine.stats
    assert stats.answered == stats.received == len(asked) and stats.answer_slots == stats.question_slots == 0
    assert stats.num_steps_wasted <= stats.num_steps_ahead and (stats.num_steps_wasted == 0 or lead > 1)


class Scripted:
    """A model whose row in slot s says [SEP] at position ends[s], and 7 before."""

    def __init__(self, ends):
        self.ends = torch.tensor(ends)

    def decode_best(self, fed, cache, slots, positions, questions, num_best):
        ids = torch.where(positions >= self.ends[slots.long()], 3, 7)
        return torch.zeros(len(ids), 1), ids[:, None]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("lead", [1, 2, 3])
@pytest.mark.parametrize("ends", [[0], [2, 4, 1], [6, 0], [7, 2], [30]])
def test_a_flight_ends_with_its_last_row(ends, lead, beside):
    """Of the steps launched, at most lead - 1 come after every row's end; beside a prefill, of which nobody looks until
    it is over, all that were allowed."""
    cache = SimpleNamespace(self_k=torch.zeros(1), answer_length=40)
    slots = SimpleNamespace(cache=cache, spare_answers=[], spare_question=-1)
    pilot = Autopilot(Scripted(ends), slots, Graphs(torch.device("cpu"), 0), 8)
    assert pilot.lead == 1
    pilot.lead = lead
    for _ in range(2):  # the second on the first one's tensors
        flight = pilot.start([Row(5, i, 0, 0, Ahead(40, 3)) for i in range(len(ends))], beside)
        blind = 8 if beside and lead > 1 else lead
        assert flight.launched == blind
        tokens, _ = flight.results()
        needed = min(max(ends) + 1, 8)
        assert flight.launched == (8 if blind == 8 else min(needed + lead - 1, 8))
        assert flight.wasted == flight.launched - needed
        for row, end in zip(tokens, ends, strict=True):
            assert row[: end + 1] == ([7] * end + [3])[: len(row)]


def test_steps_are_counted(parts):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=4))
    lengths = [len(r.answer.token_ids) for r in answers(engine, [(0, 0, 0), (0, 1, 0)], images)]
    stats = engine.stats
    assert (stats.num_steps_ahead, stats.num_steps_wasted) == (max(lengths), 0)
    assert stats.num_decoded_rows == sum(lengths)


def test_all_steps_are_launched_at_once_only_where_somebody_waits(parts, monkeypatch):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=2, fill_up=True))
    first = engine.add(images[0], QUESTIONS[0], SamplingParams(num_alternatives=0, max_new_tokens=6))
    engine.step()
    if first.done:
        pytest.skip("these weights end the answer in the first two tokens")
    told, start = [], engine.runner._autopilot.start
    monkeypatch.setattr(
        engine.runner._autopilot, "start", lambda rows, beside: told.append(beside) or start(rows, beside)
    )
    engine.add(images[1], QUESTIONS[0], SamplingParams(num_alternatives=0))
    engine.step()
    while engine.busy:
        engine.step()
    assert told[0] is True and not any(told[1:])


def test_memory_that_runs_out_on_the_way_costs_nobody(parts, truth, monkeypatch):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=3, fill_up=True))
    requests = [engine.add(images[0], q, WAYS[0]) for q in QUESTIONS]
    engine.step()
    if all(r.done for r in requests):
        pytest.skip("these weights end every answer in the first three tokens")
    failed, launch = [], Flight.launch

    def full(self, most):
        if not failed and self.launched == 2:
            failed.append(self)
            raise MemoryError
        launch(self, most)

    monkeypatch.setattr(Flight, "launch", full)
    while engine.busy:
        engine.step()
    assert failed
    for number, request in enumerate(requests):
        assert request.answer.token_ids == truth(0, number, 0).token_ids


def test_fewer_looks_than_tokens(parts):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=8, fill_up=True))
    request = engine.add(images[0], QUESTIONS[0], SamplingParams(num_alternatives=0))
    engine.step()
    assert request.done and len(request.answer.token_ids) > 1


def test_new_requests_are_prefilled_beside_those_under_way(parts, monkeypatch):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=2, fill_up=True))
    first = engine.add(images[0], QUESTIONS[0], SamplingParams(num_alternatives=0, max_new_tokens=6))
    engine.step()
    if first.done:
        pytest.skip("these weights end the answer in the first two tokens")
    seen = []
    run = engine.runner.prefilling.run
    monkeypatch.setattr(
        engine.runner.prefilling, "run", lambda some: (seen.append(engine.runner._under_way), run(some))
    )
    second = engine.add(images[1], QUESTIONS[0], SamplingParams(num_alternatives=0))
    engine.step()
    assert seen[0] is not None and seen[0][0] == [first] and not second.token_ids
    while engine.busy:
        engine.step()
    assert first.answer and second.answer


def test_no_memory_for_what_is_under_way_costs_the_one_that_is_too_much(parts, monkeypatch):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=2, fill_up=True))
    requests = [engine.add(images[0], q, SamplingParams(num_alternatives=0, max_new_tokens=6)) for q in QUESTIONS]
    engine.step()
    poison = next((r for r in requests if not r.done), None)
    if poison is None:
        pytest.skip("these weights end every answer in the first two tokens")
    start = engine.runner._start

    def full(some, *beside):
        if poison in some:
            raise MemoryError
        return start(some, *beside)

    monkeypatch.setattr(engine.runner, "_start", full)
    while engine.busy:
        engine.step()
    assert poison.error is not None and poison.error.code == "out_of_memory"
    assert all(r.answer is not None for r in requests if r is not poison)
    assert engine.stats.answer_slots == 0


def test_forgetting_images_forgets_programs(parts):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=4, fill_up=True))
    engine.answer(images[0], QUESTIONS[0])
    assert engine.runner.graphs._programs
    engine.forget_images()
    assert not engine.runner.graphs._programs


def test_cancelled_under_way(parts):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=2, fill_up=True))
    requests = [engine.add(images[0], q, SamplingParams(num_alternatives=0)) for q in QUESTIONS]
    engine.step()
    engine.cancel(requests[1])
    while engine.busy:
        engine.step()
    assert engine.stats.answer_slots == 0
    assert [r.error is None for r in requests if r is not requests[1]] == [True, True]


def test_overflowed_logits_fail_their_request_alone(parts):
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=4))
    bias = model.decoder.head.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[5] = float("nan")
    try:
        with pytest.raises(ValueError, match="wider precision"):
            engine.answer(images[0], QUESTIONS[0], SamplingParams(temperature=1.0, seed=0, num_alternatives=0))
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert engine.answer(images[0], QUESTIONS[0]).text is not None


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**31), st.integers(1, 5), st.data())
def test_draws_by_the_hosts_rule(seed, rows, data):
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 60))
    logits = torch.from_numpy(random.normal(0, data.draw(st.sampled_from([0.1, 2.0, 300.0])), (rows, size)))
    if size > 3:
        logits[:, 1] = logits[:, 2]
        logits[:, 0] = -torch.inf
    logits = logits.float()
    cut = [
        (
            data.draw(st.sampled_from([0.3, 1.0, 4.0])),
            data.draw(st.sampled_from([0, 1, 3, 500])),
            data.draw(st.sampled_from([1.0, 0.9, 0.4, 1e-6])),
        )
        for _ in range(rows)
    ]
    at = [data.draw(st.floats(0, 1, exclude_max=True)) for _ in range(rows)]
    cuts = Cuts(
        *(
            torch.tensor(column, dtype=kind)
            for column, kind in zip(zip(*cut, strict=True), (torch.float64, torch.int64, torch.float64), strict=True)
        )
    )
    ordered = any(k or p < 1 for _, k, p in cut)
    tokens, logprobs = draw_rows(logits, torch.tensor(at, dtype=torch.float64), cuts, ordered)
    for row in range(rows):
        token, logprob = draw(logits[row].double().numpy(), at[row], *cut[row])
        if tokens[row] != token:  # `at` within rounding of a border
            near = [
                draw(logits[row].double().numpy(), min(max(at[row] + d, 0), 1 - 1e-16), *cut[row])[0]
                for d in (-1e-12, 1e-12)
            ]
            assert int(tokens[row]) in near
        else:
            assert float(logprobs[row]) == pytest.approx(logprob, abs=1e-9)


def test_logits_without_a_maximum_are_told():
    cuts = Cuts(
        torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.float64)
    )
    logits = torch.tensor([[0.0, torch.nan], [-torch.inf, -torch.inf], [torch.inf, 0.0]])
    for ordered in (False, True):
        _, logprobs = draw_rows(logits, torch.full((3,), 0.5, dtype=torch.float64), cuts, ordered)
        assert logprobs.isnan().all()


def test_buckets():
    assert [bucket_of(n) for n in (1, 3, 9, 192, 193, 256)] == [1, 4, 16, 192, 256, 256]
    gaps = [b - a - 1 for a, b in itertools.pairwise(BUCKETS)]
    assert max(gaps) <= 63 and list(BUCKETS) == sorted(BUCKETS)


def test_a_program_is_made_once_a_key():
    graphs, made = Graphs(torch.device("cpu"), 1 << 20), []

    def make():
        made.append(1)
        return "owner", lambda: None

    assert graphs.program("a", make) == graphs.program("a", make) and len(made) == 1
    graphs.program("b", make)
    graphs.clear()
    graphs.program("a", make)
    assert len(made) == 3


def test_short_answers_in_filled_batches(parts, truth):
    """33 rows are filled up to 64: 31 rows that stand still, five to a spare slot."""
    model, processor, images = parts
    engine = Engine(model, processor, config=EngineConfig(steps_ahead=4, fill_up=True, answer_length=5))
    params = SamplingParams(num_alternatives=0, max_new_tokens=5)
    requests = [engine.add(images[i % 3], QUESTIONS[i % 3], params) for i in range(33)]
    while engine.busy:
        engine.step()
    for i, request in enumerate(requests):
        assert request.error is None
        assert request.answer.token_ids == truth(i % 3, i % 3, 0).token_ids[:5]
