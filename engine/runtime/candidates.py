"""Lists of answers that a caller gives, to rank or to choose from, as the model takes them.

Knows texts, their tokens and the trie of them; does not know models or probabilities.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from miss.engine.data.processor import Processor, clean_text
from miss.engine.runtime.candidate_tree import CandidateTree
from miss.engine.runtime.trie import AnswerTrie

_REMEMBERED = 16  # lists: a service asks with few, again and again


@dataclass(frozen=True, eq=False)
class Candidates:
    """texts: of the distinct answers, as they were given, in their order: `trie.answers`'. warnings: what was merged or
    could not be read in full, in whole sentences."""

    texts: list[str]
    trie: AnswerTrie
    warnings: list[str]

    @classmethod
    def encode(cls, texts: Sequence[str], processor: Processor, longest: int) -> "Candidates":
        """Tokenises a list of answers; those of the same tokens (letter case, spaces) are one, the first.

        Args:
            longest: tokens that an answer may have, the closing [SEP] included.

        Raises:
            ValueError: the list is empty, an answer is, or one is longer.
        """
        if not texts:
            raise ValueError("the list of answers is empty; wanted at least one")
        seen: dict[tuple[int, ...], str] = {}
        warnings: list[str] = []
        for text in texts:
            ids = tuple(processor.tokenizer.encode(clean_text(text), add_special_tokens=False).ids)
            if not ids:
                raise ValueError(f"an answer in the list is empty: got {text!r}; wanted text")
            if len(ids) + 1 > longest:
                raise ValueError(
                    f"the answer {text!r} has {len(ids) + 1} tokens, its end included; accepted: up to {longest} "
                    "(max_new_tokens)"
                )
            if ids in seen:
                warnings.append(f"the answer {text!r} is the same as {seen[ids]!r} in the list, and was merged with it")
            elif processor.unknown in ids:
                warnings.append(f"the answer {text!r} holds characters that are not in the vocabulary")
            seen.setdefault(ids, text)
        return cls(list(seen.values()), AnswerTrie.build(seen, processor.sep), warnings)

    @cached_property
    def tree(self) -> CandidateTree:
        """What ranks them."""
        return CandidateTree(self.trie, self.trie.answers[0][-1])

    def text(self, token_ids: Sequence[int]) -> str:
        """The answer as it was given.

        Raises:
            KeyError: these tokens are none of the list's answers.
        """
        return self.texts[self.trie.index[tuple(token_ids)]]


class CandidateLists:
    """The lists that were asked for last, tokenised once. May be called from any thread."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._known: OrderedDict[tuple[tuple[str, ...], int], Candidates] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, texts: tuple[str, ...], longest: int) -> Candidates:
        """See `Candidates.encode`."""
        key = (texts, longest)
        with self._lock:
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = Candidates.encode(texts, self._processor, longest)
            self._known.move_to_end(key)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            return found
