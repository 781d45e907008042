"""The tokenizer file of a checkpoint: bert-base-uncased's words and the two special tokens that MISS adds.

Knows tokenizer files and token ids; does not know texts, lengths or models.
"""

import json
import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from miss.models.config import TokenConfig
from miss.models.weights import TOKENIZER, CheckpointError


def find_tokenizer(path: str | os.PathLike[str]) -> Path | None:
    """The tokenizer.json or vocab.txt in a folder, or beside a file; None where there is neither."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return next((folder / name for name in (TOKENIZER, "vocab.txt") if (folder / name).is_file()), None)


def checkpoint_tokenizer(content: bytes, tokens: TokenConfig, vocab_size: int, where: str) -> bytes:
    """A tokenizer.json for a checkpoint, from a tokenizer.json or a vocab.txt of bert-base-uncased's kind.

    [DEC] and [ENC] are added, in that order, where they are not there yet; truncation and padding are taken out (they
    are the processor's).

    Raises:
        CheckpointError: it is neither, or its ids do not fit the configuration's special tokens or vocabulary.
    """
    tokenizer = _from_json(content, where) if content.lstrip()[:1] == b"{" else _from_words(content, where)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("[DEC]", "[ENC]")])
    wanted = {"[PAD]": tokens.pad, "[CLS]": tokens.cls, "[SEP]": tokens.sep, "[DEC]": tokens.dec, "[ENC]": tokens.enc}
    for token, identity in wanted.items():
        if tokenizer.token_to_id(token) != identity:
            raise CheckpointError(
                f"{where}: {token} has id {tokenizer.token_to_id(token)}, the model wants {identity}: "
                f"wanted the vocabulary that the checkpoint was trained with (bert-base-uncased's)"
            )
    if tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(
            f"{where}: has {tokenizer.get_vocab_size()} tokens, the model's word table {vocab_size} rows: "
            f"wanted the vocabulary that the checkpoint was trained with"
        )
    return tokenizer.to_str().encode()


def _from_json(content: bytes, where: str) -> Tokenizer:
    try:
        json.loads(content)
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the tokenizers library raises bare Exception for what it cannot read
        raise CheckpointError(f"{where}: not a tokenizer.json ({error})") from None


def _from_words(content: bytes, where: str) -> Tokenizer:
    """BERT's uncased tokenizer over a vocab.txt: one word a line, its id the line's number."""
    try:
        words = content.decode().splitlines()
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: neither a tokenizer.json nor a vocab.txt") from None
    if "[UNK]" not in words:
        raise CheckpointError(f"{where}: neither a tokenizer.json nor a vocab.txt with [UNK] in it")
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in words]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer
