"""Ranking: the packed tree against every candidate by itself, in both behaviours, however it is cut into passes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.runtime.candidate_tree import CandidateTree
from miss.engine.runtime.ranker import rank_questions
from miss.engine.runtime.trie import AnswerTrie
from miss.models.cache import KVCache
from miss.models.config import MissConfig, PreprocessConfig
from miss.models.vqa import MissVQA
from tests.engine.test_batch import TOKENS, images, questions, tiny_config


def scattered(config: MissConfig, dtype: torch.dtype, seed: int = 3, size: float = 0.3) -> MissVQA:
    """Random weights far from uniform answers."""
    torch.manual_seed(seed)
    model = MissVQA(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (size if p.dim() > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def model() -> MissVQA:
    return scattered(tiny_config(), torch.float64)


class Asked:
    """Questions over one image, in the cache's slots in reverse order; and each candidate's truth, one by one."""

    def __init__(self, model: MissVQA, lengths: list[int], pixels: torch.Tensor | None = None) -> None:
        self.model, self.num = model, len(lengths)
        ids, self.lengths = questions(lengths)
        tokens = model.encode_images(images(1) if pixels is None else pixels)
        index = torch.zeros(self.num, dtype=torch.int32)
        dtype = tokens.dtype
        self.slots = list(range(self.num))[::-1]
        self.cache = KVCache.allocate(model.config.decoder, 1, self.num, 1, ids.shape[1], dtype)
        model.encode(model.project_images(tokens), index, ids, self.lengths, self.cache, torch.tensor(self.slots))

    @torch.no_grad()
    def truth(self, question: int, answer: tuple[int, ...], smoothing: float = 0.0) -> float:
        """Teacher-forced: minus the summed cross entropy of the whole answer."""
        decoder, tokens = self.model.decoder, torch.tensor([[self.model.config.tokens.dec, *answer[:-1]]])
        kv = [self.cache.question(i) for i in range(self.model.config.decoder.num_layers)]
        at = torch.tensor([self.slots[question]], dtype=torch.int32)
        logits = decoder.logits(decoder.head(decoder(tokens, kv, at, self.cache.question_lengths)))[0]
        loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="sum")
        return -loss(logits, torch.tensor(answer)).item()

    def rank(self, lists: list[list[list[int]]], **options: int):
        trees = [
            CandidateTree(AnswerTrie.build(each, self.model.config.tokens.sep), self.model.config.tokens.sep)
            for each in lists
        ]
        return rank_questions(self.model, self.cache, self.slots, trees, **options)


ANSWER = st.lists(st.integers(5, 29), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(ANSWER, min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 40))
def test_ranking_equals_scoring_one_by_one(model, lists, most_nodes):
    asked = Asked(model, [3 + 2 * q for q in range(len(lists))])
    for q, found in enumerate(asked.rank(lists, most_nodes=most_nodes)):
        distinct = list(dict.fromkeys((*a, TOKENS.sep) for a in lists[q]))
        truth = {answer: asked.truth(q, answer) for answer in distinct}
        assert [tuple(h.token_ids) for h in found] == sorted(distinct, key=lambda a: -truth[a])
        for h in found:
            assert h.finished and h.beam_score is None
            assert h.logprob == pytest.approx(truth[tuple(h.token_ids)], abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(ANSWER, min_size=1, max_size=40), st.integers(1, 30))
def test_a_long_list_is_cut_into_parts_that_hold_all_of_it(answers, most_nodes):
    trie = AnswerTrie.build(answers, TOKENS.sep)
    tree = CandidateTree(trie, TOKENS.sep, most_nodes)
    assert sorted(i for part in tree.parts for i in part.answers.tolist()) == list(range(len(trie.answers)))
    for part in tree.parts:
        assert len(part.ids) <= max(most_nodes, trie.longest)
        assert len(part.ids) + len(part.answers) == len(part.edge_token) + 1
        lengths = part.sums(torch.ones(len(part.edge_token)).numpy())
        assert lengths.tolist() == [len(trie.answers[i]) for i in part.answers]


def test_parts_of_a_cut_list_score_as_the_whole(model):
    torch.manual_seed(0)
    answers = [torch.randint(5, 30, (1 + i % 4,)).tolist() for i in range(90)]
    asked = Asked(model, [6, 4])
    trie = AnswerTrie.build(answers, TOKENS.sep)
    whole = rank_questions(model, asked.cache, asked.slots, [CandidateTree(trie, TOKENS.sep)] * 2)
    parts = CandidateTree(trie, TOKENS.sep, most_nodes=20)
    assert len(parts.parts) > 5
    for a, b in zip(whole, rank_questions(model, asked.cache, asked.slots, [parts] * 2), strict=True):
        assert [h.token_ids for h in a] == [h.token_ids for h in b]
        assert [h.logprob for h in a] == pytest.approx([h.logprob for h in b], abs=1e-10)


@pytest.mark.parametrize("num_answers", [9, 200])
def test_compat_ranks_as_the_original(model, num_answers):
    """The 128 likeliest first tokens of the list, then the smoothed training loss of the whole answer."""
    compat = MissVQA(dataclasses.replace(model.config, behaviour="compat")).double().eval()
    compat.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    answers = [torch.randint(5, 30, (1 + i % 3,)).tolist() for i in range(num_answers)]
    asked = Asked(compat, [7, 5])
    distinct = list(dict.fromkeys((*a, TOKENS.sep) for a in answers))
    for q, found in enumerate(asked.rank([answers, answers])):
        first = {token: asked.truth(q, (token,)) for token in {a[0] for a in distinct}}
        kept = sorted(range(len(distinct)), key=lambda i: -first[distinct[i][0]])[:128]  # stable: the list's order
        truth = {distinct[i]: asked.truth(q, distinct[i], smoothing=0.1) for i in kept}
        assert [tuple(h.token_ids) for h in found] == sorted(truth, key=lambda a: -truth[a])
        for h in found:
            assert h.beam_score == pytest.approx(truth[tuple(h.token_ids)], abs=1e-10)
            assert h.logprob == pytest.approx(asked.truth(q, tuple(h.token_ids)), abs=1e-10)


def test_compat_can_mask_the_padding_that_generation_attends_to(model):
    compat = MissVQA(dataclasses.replace(model.config, behaviour="compat")).double().eval()
    compat.load_state_dict(model.state_dict())
    asked, tree = Asked(compat, [3, 9]), CandidateTree(AnswerTrie.build([[7], [8, 9]], TOKENS.sep), TOKENS.sep)
    true = torch.empty(2, dtype=torch.int32)
    true[asked.slots] = asked.lengths
    padded, masked = (rank_questions(compat, asked.cache, asked.slots, [tree] * 2, n)[0][0] for n in (None, true))
    ids, lengths = questions([3, 9])
    alone = Asked.__new__(Asked)
    alone.model, alone.slots = compat, [0]
    alone.cache = KVCache.allocate(compat.config.decoder, 1, 1, 1, 3, torch.float64)
    index = torch.zeros(1, dtype=torch.int32)
    kv = compat.project_images(compat.encode_images(images(1)))
    compat.encode(kv, index, ids[:1, :3], lengths[:1], alone.cache, torch.tensor([0]))
    wanted = rank_questions(compat, alone.cache, [0], [tree])[0][0]
    assert masked.beam_score == pytest.approx(wanted.beam_score, abs=1e-10)
    assert padded.beam_score != pytest.approx(wanted.beam_score, abs=1e-6)


def test_two_layers_of_base_in_float32():
    base = MissConfig.preset("base")
    two = dataclasses.replace(base.decoder, num_layers=2)
    config = dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, num_layers=1),
        encoder=two,
        decoder=two,
        preprocess=PreprocessConfig(image_size=32),
        tie_embeddings=True,
    )
    model = scattered(config, torch.float32, size=0.03).prepare()
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    asked = Asked(model, [8], pixels)
    torch.manual_seed(2)
    answers = [[2000 + 7 * (i % 11), *torch.randint(1000, 30000, (i % 4,)).tolist()] for i in range(24)]
    for q, found in enumerate(asked.rank([answers])):
        truth = {tuple(h.token_ids): asked.truth(q, tuple(h.token_ids)) for h in found}
        assert [tuple(h.token_ids) for h in found] == sorted(truth, key=lambda a: -truth[a])
        for h in found:
            assert h.logprob == pytest.approx(truth[tuple(h.token_ids)], abs=2e-4)
