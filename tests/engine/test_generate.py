"""Generation over the cache: equal to teacher forcing, to itself in any batch, and to its rules."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.runtime.generate import generate
from miss.engine.runtime.sampler import BeamSearch
from miss.models.config import MissConfig, PreprocessConfig, TextConfig, TokenConfig, VisionConfig
from miss.models.vqa import MissVQA

TOKENS = TokenConfig(pad=0, cls=1, sep=2, dec=3, enc=4)
NEW_TOKENS = 5


def tiny_config(behaviour="correct") -> MissConfig:
    text = TextConfig(vocab_size=30, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, source_width=32)
    return MissConfig(
        vision=VisionConfig(
            image_size=16, patch_size=8, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48
        ),
        encoder=text,
        decoder=text,
        preprocess=PreprocessConfig(image_size=16, rescale_factor=1 / 64),
        tokens=TOKENS,
        behaviour=behaviour,
    )


@pytest.fixture(scope="module")
def model() -> MissVQA:
    torch.manual_seed(3)
    model = MissVQA(tiny_config()).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # far from uniform, so that answers end at different lengths
            p.add_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1))
    return model


def questions(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 30, (length,), generator=g)
        row[0] = TOKENS.enc
    return ids, torch.tensor(lengths, dtype=torch.int32)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))


def answers(model, pixels, index, ids, lengths, **options):
    index = torch.tensor(index, dtype=torch.int32)
    return generate(model, pixels, index, ids, lengths, NEW_TOKENS, **options).hypotheses


def teacher_forced(model, pixels, ids, lengths, answer: list[int]) -> torch.Tensor:
    """log p of every answer position for one question, without a cache: (len(answer), V)."""
    kv = model.project_images(model.encode_images(pixels))
    index = torch.zeros(1, dtype=torch.int32)
    states = model.encode_questions(ids, lengths, kv, index)
    tokens = torch.tensor([[TOKENS.dec, *answer[:-1]]])
    hidden = model.decoder(tokens, model.project_questions(states), index, lengths)
    return torch.log_softmax(model.decoder.logits(model.decoder.head(hidden)), -1)[0]


@torch.no_grad()
def test_greedy_takes_the_likeliest_token_and_scores_as_teacher_forcing_does(model):
    ids, lengths = questions([6])
    for branch in answers(model, images(1), [0], ids, lengths, num_alternatives=2)[0]:
        table = teacher_forced(model, images(1), ids, lengths, branch.token_ids)
        taken = table[range(len(branch.token_ids)), branch.token_ids]
        assert branch.logprob == pytest.approx(taken.sum().item(), abs=1e-9)
        assert (table[1:].argmax(-1).tolist()) == branch.token_ids[1:]  # greedy after the first token
        assert branch.finished == (branch.token_ids[-1] == TOKENS.sep)


@torch.no_grad()
def test_alternatives_start_with_the_next_best_first_tokens(model):
    ids, lengths = questions([6])
    found = answers(model, images(1), [0], ids, lengths, num_alternatives=3)[0]
    first = teacher_forced(model, images(1), ids, lengths, [5])[0]
    assert found[0].token_ids[0] == first.argmax().item()
    assert {h.token_ids[0] for h in found} == set(first.topk(4).indices.tolist())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.sampled_from([1, 3]), st.data())
def test_an_answer_does_not_depend_on_its_batch(model, lengths, num_beams, data):
    """`correct` behaviour: any mates, any padding, any sharing of images."""
    index = sorted(data.draw(st.lists(st.integers(0, 1), min_size=len(lengths), max_size=len(lengths))))
    index = [i - index[0] for i in index]
    ids, lens = questions(lengths, seed=sum(lengths))
    pixels = images(2)
    together = answers(model, pixels, index, ids, lens, num_beams=num_beams)
    for row, length in enumerate(lengths):
        alone = answers(
            model, pixels[index[row]][None], [0], ids[row : row + 1, :length], lens[row : row + 1], num_beams=num_beams
        )[0]
        assert [h.token_ids for h in alone] == [h.token_ids for h in together[row]]
        for a, b in zip(alone, together[row], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-9)


def test_compat_depends_on_padding_as_the_original_does(model):
    compat = MissVQA(tiny_config("compat")).double().eval()
    compat.load_state_dict(model.state_dict())
    ids, lens = questions([3, 9])
    together = answers(compat, images(1), [0, 0], ids, lens)
    alone = answers(compat, images(1), [0], ids[:1, :3], lens[:1])
    assert alone[0][0].logprob != pytest.approx(together[0][0].logprob, abs=1e-6)
    longest = answers(compat, images(1), [0], ids[1:], lens[1:])
    assert longest[0][0].logprob == pytest.approx(together[1][0].logprob, abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("behaviour", ["correct", "compat"])
def test_beams_are_the_search_over_teacher_forced_probabilities(model, behaviour):
    """The cache, its reordering and the batching against a search that computes each prefix from scratch."""
    config = dataclasses.replace(model.config, behaviour=behaviour)
    searched = MissVQA(config).double().eval()
    searched.load_state_dict(model.state_dict())
    ids, lengths = questions([5, 5])
    found = answers(searched, images(2), [0, 1], ids, lengths, num_beams=3)
    for q in range(2):
        beams = BeamSearch(3, TOKENS.sep, behaviour)
        for _ in range(NEW_TOKENS):
            if beams.done:
                break
            options = []
            for b, h in enumerate(beams.open):
                table = teacher_forced(model, images(2)[q][None], ids[q : q + 1], lengths[q : q + 1], [*h.token_ids, 0])
                options += [(b, t, p, h.logprob + p) for t, p in enumerate(table[-1].tolist())]
            options.sort(key=lambda o: -o[3])
            beams.advance([o[:3] for o in options[:6]])
        want = beams.finish()
        assert [h.token_ids for h in want] == [h.token_ids for h in found[q]]
        assert [h.logprob for h in found[q]] == pytest.approx([h.logprob for h in want], abs=1e-9)


def test_an_answer_that_runs_out_of_tokens_is_not_finished(model):
    ids, lengths = questions([6])
    for h in generate(model, images(1), torch.zeros(1, dtype=torch.int32), ids, lengths, 1).hypotheses[0]:
        assert len(h.token_ids) == 1 and h.finished == (h.token_ids[0] == TOKENS.sep)
