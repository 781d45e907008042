"""A pretraining step read off the formulas word by word, slowly: what `models/pretrain.py` must equal, and
what `bench_pretrain.py` times beside it.

Plain PyTorch on a dictionary of tensors under our names. Text stays padded, every tower computes every row, image keys
and values are projected anew for positives, for each kind of negative and for the captions, as the original does.
Kinder than the original: Q, K and V are one product, the twin moves in place and has no cross-attention, negatives are
drawn together. Masked words are an option that the original does not have. Without dropout.

Shapes: B pairs, N image tokens, T caption length, H heads, D head width, C width, P width of a feature, Q places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.dropout import as_seed, uniform
from miss.models.config import MissConfig, TextConfig
from miss.models.layers import mix

Tensors = dict[str, Tensor]


def dense(p: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def norm(p: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    """q (B, T, C) over k, v (B, S, C); mask bool, True where a key is seen, broadcast against (B, H, T, S)."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (~mask) * -10000.0
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def image_tokens(p: Tensors, pixels: Tensor, config: MissConfig) -> Tensor:
    """pixels (B, S, S, 3) -> (B, N, C), [CLS] first."""
    v = config.vision
    scale, shift = (torch.tensor(t, dtype=torch.float64).float().to(pixels.dtype) for t in config.preprocess.affine)
    x = (pixels * scale + shift).permute(0, 3, 1, 2)
    x = F.conv2d(x, p["vision.patch_embed.weight"], p["vision.patch_embed.bias"], stride=v.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["vision.cls_token"].expand(len(x), -1, -1), x], 1) + p["vision.position_embedding"]
    for i in range(v.num_layers):
        block = f"vision.blocks.{i}"
        h = norm(p, f"{block}.norm1", x, v.layer_norm_eps)
        q, k, val = dense(p, f"{block}.attention.qkv", h).chunk(3, -1)
        x = x + dense(p, f"{block}.attention.output", attend(q, k, val, v.num_heads, None))
        h = norm(p, f"{block}.norm2", x, v.layer_norm_eps)
        x = x + dense(p, f"{block}.mlp.output", F.gelu(dense(p, f"{block}.mlp.input", h)))
    return norm(p, "vision.norm", x, v.layer_norm_eps)


def text_states(
    p: Tensors, config: TextConfig, ids: Tensor, real: Tensor, tokens: Tensor | None, own: str, causal: bool = False
) -> Tensor:
    """States (R, T, C). `own`: whose self-attention, encoder or decoder; all else is the encoder's.
    tokens (R, N, C)."""
    eps, width = config.layer_norm_eps, config.hidden_size
    x = p["encoder.embeddings.word.weight"][ids] + p["encoder.embeddings.position.weight"][: ids.shape[1]]
    x = norm(p, "encoder.embeddings.norm", x, eps)
    mask = real[:, None, None, :]
    if causal:
        mask = mask & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    # Cut once: a slice a layer would make its gradient a zero tensor of the whole stack, which the original has not.
    stacks = () if tokens is None else (p["encoder.cross_kv.weight"], p["encoder.cross_kv.bias"])
    cut = [stack.split(2 * width) for stack in stacks]
    for i in range(config.num_layers):
        layer, mine = f"encoder.layers.{i}", f"{own}.layers.{i}.self_attention"
        q, k, v = dense(p, f"{mine}.qkv", x).chunk(3, -1)
        read = dense(p, f"{mine}.output", attend(q, k, v, config.num_heads, mask))
        x = norm(p, f"{mine}.norm", x + read, eps)
        if tokens is not None:
            kv = F.linear(tokens, *(parts[i] for parts in cut))
            q, (k, v) = dense(p, f"{layer}.cross_attention.query", x), kv.chunk(2, -1)
            read = dense(p, f"{layer}.cross_attention.output", attend(q, k, v, config.num_heads, None))
            x = norm(p, f"{layer}.cross_attention.norm", x + read, eps)
        h = dense(p, f"{layer}.mlp.output", F.gelu(dense(p, f"{layer}.mlp.input", x)))
        x = norm(p, f"{layer}.mlp.norm", x + h, eps)
    return x


def soft_contrast(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    queue: tuple[Tensor, Tensor],
    temperature: Tensor,
    alpha: float,
    same: Tensor | None = None,
) -> Tensor:
    """Mean over rows and directions. queue: image and text (Q, P). same: bool (B, B + Q), equal captions that are not
    the own: left out of numerator and denominator."""
    image_all, text_all = torch.cat([image_m, queue[0]]), torch.cat([text_m, queue[1]])
    targets = torch.zeros(len(image), len(image_all), dtype=image.dtype)
    targets.fill_diagonal_(1)
    total = torch.zeros((), dtype=image.dtype)
    for student, teacher, others in ((image, image_m, text_all), (text, text_m, image_all)):
        s, s_m = student @ others.T / temperature, teacher @ others.T / temperature
        if same is not None:
            s, s_m = s.masked_fill(same, -torch.inf), s_m.masked_fill(same, -torch.inf)
        y = (alpha * s_m.softmax(1) + (1 - alpha) * targets).detach()
        logs = s.log_softmax(1)
        total = total - torch.where(y > 0, y * torch.where(y > 0, logs, 0.0), 0.0).sum(1).mean() / 2
    return total


def draw(weights: Tensor, seed: int | None) -> Tensor:
    """One column of each row with that weight: the largest weight / -log(u), u the operation's own counters."""
    counters = as_seed(seed, 0.5)
    assert counters is not None
    u = uniform(counters, tuple(weights.shape), weights.device)
    return (weights / -u.to(weights.dtype).log()).argmax(1)


def hide(ids: Tensor, lengths: Tensor, mask: int, config: MissConfig, seed: int) -> tuple[Tensor, Tensor]:
    """(ids with 15 % of the inner words hidden, what they were, elsewhere -100), caption by caption, word by word."""
    width, words = config.encoder.max_positions, config.encoder.vocab_size
    specials = {config.tokens.pad, config.tokens.cls, config.tokens.sep, config.tokens.dec, config.tokens.enc}
    draws = []
    for site in range(3):
        counters = as_seed(mix(seed, site), 0.5)
        assert counters is not None
        draws.append(uniform(counters, (len(ids), width), ids.device))
    hidden, labels = ids.clone(), torch.full_like(ids, -100)
    for row, length in enumerate(lengths.tolist()):
        for place in range(1, length - 1):
            chance, fate, word = (float(u[row, place]) for u in draws)
            old = int(ids[row, place])
            if old in specials or chance >= 0.15:
                continue
            labels[row, place] = old
            hidden[row, place] = mask if fate < 0.8 else int(word * words) if fate < 0.9 else old
    return hidden, labels


@dataclass
class Step:
    """The original's training state: parameters, their momentum copies, queues and pointer."""

    config: MissConfig
    p: Tensors
    m: Tensors
    image_queue: Tensor
    text_queue: Tensor
    id_queue: Tensor
    pointer: int = 0
    momentum: float = 0.995
    compat: bool = False
    mlm: float = 0.0
    mask: int = 103

    def __call__(
        self,
        pixels: Tensor,
        ids: Tensor,
        lengths: Tensor,
        numbers: Tensor,
        alpha: float,
        seed: int,
        smoothing: float = 0.1,
    ) -> Tensors:
        p, config, tokens = self.p, self.config, self.config.tokens
        size, text = len(ids), config.encoder
        with torch.no_grad():
            p["temperature"].clamp_(0.001, 0.5)
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        cls, enc, dec = ids.clone(), ids.clone(), ids.clone()
        cls[:, 0], enc[:, 0], dec[:, 0] = tokens.cls, tokens.enc, tokens.dec
        images = image_tokens(p, pixels, config)
        image = F.normalize(dense(p, "image_projection", images[:, 0]), dim=-1)
        states = text_states(p, text, cls, real, None, "encoder")
        written = F.normalize(dense(p, "text_projection", states[:, 0]), dim=-1)
        with torch.no_grad():
            for name, average in self.m.items():
                average.mul_(self.momentum).add_(p[name], alpha=1 - self.momentum)
            image_m = F.normalize(dense(self.m, "image_projection", image_tokens(self.m, pixels, config)[:, 0]), dim=-1)
            states_m = text_states(self.m, text, cls, real, None, "encoder")
            text_m = F.normalize(dense(self.m, "text_projection", states_m[:, 0]), dim=-1)
        same = None
        if not self.compat:
            same = numbers[:, None] == torch.cat([numbers, self.id_queue])
            same[:, :size] &= ~torch.eye(size, dtype=torch.bool)
        queue = self.image_queue.clone(), self.text_queue.clone()
        itc = soft_contrast(image, written, image_m, text_m, queue, p["temperature"], alpha, same)

        positive = text_states(p, text, enc, real, images, "encoder")[:, 0]
        with torch.no_grad():
            to_image = (written @ image_m.T / p["temperature"]).softmax(1) + 1e-4
            to_text = (image @ text_m.T / p["temperature"]).softmax(1) + 1e-4
            for weights in (to_image, to_text):
                weights.fill_diagonal_(0)
                if same is not None:
                    weights.masked_fill_(same[:, :size], 0)
            image_of, text_of = (
                draw(weights, mix(mix(mix(seed, 1), kind), 0)) for kind, weights in enumerate((to_image, to_text))
            )
        other_image = text_states(p, text, enc, real, images[image_of], "encoder")[:, 0]
        other_text = text_states(p, text, enc[text_of], real[text_of], images, "encoder")[:, 0]
        logits = dense(p, "matching_head", torch.cat([positive, other_image, other_text]))
        itm = F.cross_entropy(logits, torch.tensor([1] * size + [0] * 2 * size))

        states = text_states(p, text, dec, real, images, "decoder", causal=True)
        logits = self._logits(states)
        labels = dec.masked_fill(~real, -100)[:, 1:]
        lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        self._enqueue(image_m, text_m, numbers)
        losses = {"itc": itc, "itm": itm, "lm": lm, "total": itc + itm + lm}
        if not self.mlm:
            return losses
        hidden, words = hide(enc, lengths, self.mask, config, mix(seed, 2))  # type: ignore[arg-type]
        logits = self._logits(text_states(p, text, hidden, real, images, "encoder"))
        mlm = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="sum") / max(1, int((words >= 0).sum()))
        return losses | {"mlm": mlm, "total": losses["total"] + self.mlm * mlm}

    def _logits(self, states: Tensor) -> Tensor:
        """Of every word of the vocabulary, with the table of the embeddings."""
        p = self.p
        h = F.gelu(dense(p, "decoder.head.transform", states))
        h = norm(p, "decoder.head.norm", h, self.config.decoder.layer_norm_eps)
        return F.linear(h, p["encoder.embeddings.word.weight"], p["decoder.head.bias"])

    def _enqueue(self, image: Tensor, text: Tensor, numbers: Tensor) -> None:
        for i in range(len(numbers)):
            self.image_queue[self.pointer], self.text_queue[self.pointer] = image[i], text[i]
            self.id_queue[self.pointer] = numbers[i]
            self.pointer = (self.pointer + 1) % len(self.id_queue)
