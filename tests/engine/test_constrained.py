"""Constrained answers: one of the list, by renormalised probabilities, the same however few steps it takes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.runtime.constrained import Constrained
from miss.engine.runtime.trie import AnswerTrie
from tests.engine.searching import drive, logprob, random_distribution
from tests.engine.test_trie import ANSWERS

END, DEC, VOCABULARY = 5, 6, 12


def constrained_probabilities(trie, distribution):
    """Of every answer, the product over its tokens of p(token) / p(what is allowed there); and the greedy answer."""
    found, greedy, node = {}, [], 0

    def walk(node, tokens, total):
        allowed = list(trie.tokens(node))
        if not allowed:
            found[tokens] = total
            return
        p = torch.softmax(distribution((DEC, *tokens))[allowed], -1).tolist()
        for i, token in enumerate(allowed):
            walk(trie.child(node, i), (*tokens, token), total * p[i])

    walk(0, (), 1.0)
    while allowed := list(trie.tokens(node)):
        best = int(distribution((DEC, *greedy))[allowed].argmax())
        greedy.append(allowed[best])
        node = trie.child(node, best)
    return found, greedy


@settings(max_examples=60, deadline=None)
@given(ANSWERS, st.integers(0, 1000), st.integers(0, 4))
def test_it_is_the_greedy_walk_and_jumping_changes_nothing(answers, seed, num_alternatives):
    trie, distribution = AnswerTrie.build(answers, END), random_distribution(seed, VOCABULARY)
    jumped = Constrained(trie, DEC, num_alternatives)
    plain = Constrained(trie, DEC, num_alternatives, jump_forward=False)
    scored = Constrained(trie, DEC, num_alternatives, unconstrained=True)
    steps, plain_steps, scored_steps = (drive(search, distribution) for search in (jumped, plain, scored))
    probabilities, greedy = constrained_probabilities(trie, distribution)
    assert sum(probabilities.values()) == pytest.approx(1)
    answer = jumped.hypotheses[0]
    assert answer.token_ids == greedy and answer.finished and tuple(greedy) in trie.index
    assert math.exp(answer.logprob) == pytest.approx(probabilities[tuple(greedy)])
    assert jumped.hypotheses == plain.hypotheses  # exactly, text and score
    assert plain_steps == scored_steps == len(greedy)
    nodes = [greedy[:n] for n in range(len(greedy))]
    assert steps == sum(len({a[len(n)] for a in trie.answers if list(a[: len(n)]) == n}) > 1 for n in nodes)
    others = jumped.hypotheses[1:]
    assert len(others) <= num_alternatives and others == sorted(others, key=lambda h: -h.logprob)
    for other in others:
        assert other.finished and other.token_ids != greedy
        assert math.exp(other.logprob) == pytest.approx(probabilities[tuple(other.token_ids)])
    unconstrained = scored.hypotheses[0]
    assert unconstrained.token_ids == greedy and unconstrained.logprob == answer.logprob
    assert unconstrained.logprob_unconstrained == pytest.approx(logprob(distribution, DEC, greedy))
    assert answer.logprob_unconstrained is None


def test_yes_and_no_are_one_step_and_each_others_alternative():
    search = Constrained(AnswerTrie.build([[1], [2]], END), DEC, num_alternatives=2)
    assert not search.done and search.wants().allowed == ((1, 2),) and search.feed()[0].tokens == (DEC,)
    distribution = random_distribution(3, VOCABULARY)
    assert drive(search, distribution) == 1
    yes, no = search.hypotheses
    assert {tuple(yes.token_ids), tuple(no.token_ids)} == {(1, END), (2, END)}
    assert math.exp(yes.logprob) + math.exp(no.logprob) == pytest.approx(1)


def test_a_single_allowed_answer_takes_no_step():
    search = Constrained(AnswerTrie.build([[1, 2, 3]], END), DEC)
    assert search.done and search.hypotheses[0].token_ids == [1, 2, 3, END] and search.hypotheses[0].logprob == 0


def test_what_is_forced_is_fed_with_the_next_choice():
    search = Constrained(AnswerTrie.build([[1, 2, 3], [1, 2, 4]], END), DEC)
    assert search.feed()[0].tokens == (DEC, 1, 2)
    assert drive(search, random_distribution(0, VOCABULARY)) == 1


def test_equal_probabilities_take_the_lower_token():
    search = Constrained(AnswerTrie.build([[4], [2], [3]], END), DEC)
    drive(search, lambda prefix: torch.zeros(VOCABULARY, dtype=torch.float64))
    assert search.hypotheses[0].token_ids == [2, END]
