"""The answer trie: holds exactly its answers, whatever their order, doubles and common beginnings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.runtime.candidates import CandidateLists, Candidates
from miss.engine.runtime.trie import ROOT, AnswerTrie

END = 99
ANSWERS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_it_holds_its_answers_and_no_others(answers):
    trie = AnswerTrie.build(answers, END)
    wanted = list(dict.fromkeys((*a, END) for a in answers))
    assert trie.answers == wanted and trie.longest == max(map(len, wanted))
    found = {}

    def walk(node, tokens):
        choices = trie.tokens(node)
        assert list(choices) == sorted(set(choices)) and trie.depth[node] == len(tokens)
        if trie.ends(node) is not None:
            assert not choices and tokens[-1] == END
            found[tokens] = trie.ends(node)
        else:
            assert choices
        for i, token in enumerate(choices):
            assert trie.parent[trie.child(node, i)] == node
            walk(trie.child(node, i), (*tokens, token))

    walk(ROOT, ())
    assert found == {tokens: i for i, tokens in enumerate(wanted)} == trie.index
    assert trie.num_nodes == 1 + len({a[:n] for a in wanted for n in range(1, len(a) + 1)})


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_a_forced_chain_ends_at_a_choice_or_an_answer(answers):
    trie = AnswerTrie.build(answers, END)
    for node in range(trie.num_nodes):
        chain, last = trie.forced(node)
        below = [a for a in trie.answers if list(a[: trie.depth[node]]) == path(trie, node)]
        assert all(list(a[trie.depth[node] :][: len(chain)]) == chain for a in below)
        assert (trie.ends(last) is not None) == (len(below) == 1)
        assert len(trie.tokens(last)) != 1


def path(trie, node):
    tokens = []
    while node != ROOT:
        tokens.append(int(trie.edge_token[node - 1]))
        node = int(trie.parent[node])
    return tokens[::-1]


@pytest.mark.parametrize("answers", [[], [[]], [[1], []], [[1, END]]])
def test_what_is_no_list_of_answers_is_an_error(answers):
    with pytest.raises(ValueError, match="wanted"):
        AnswerTrie.build(answers, END)


def test_candidates_keep_their_texts_and_say_what_was_merged(processor):
    found = Candidates.encode(["Left lung", "no", "left  LUNG", "yes", "no"], processor, 20)
    assert found.texts == ["Left lung", "no", "yes"]
    assert [found.text(tokens) for tokens in found.trie.answers] == found.texts
    assert len(found.warnings) == 2 and "'left  LUNG' is the same as 'Left lung'" in found.warnings[0]
    assert "vocabulary" in Candidates.encode(["qqq"], processor, 20).warnings[0]
    with pytest.raises(ValueError, match="accepted: up to 2"):
        Candidates.encode(["no", "left lung"], processor, 2)
    for wrong in ([], ["no", " "]):
        with pytest.raises(ValueError, match="empty"):
            Candidates.encode(wrong, processor, 20)


def test_a_list_is_tokenised_once(processor):
    lists = CandidateLists(processor)
    first = lists.get(("yes", "no"), 20)
    assert lists.get(("yes", "no"), 20) is first and lists.get(("no", "yes"), 20) is not first
    for i in range(20):
        lists.get((f"{i}",), 20)
    assert lists.get(("yes", "no"), 20) is not first
