"""The joint text-multimodal encoder (JTM): one BERT that reads a text alone, or a text over image tokens.

Knows token ids and projected image tokens; does not know where either comes from, or what reads the states.

Shapes: R text rows, T text length, I images, N image tokens, H heads, D head width, C width.
"""

from torch import Tensor, nn

from miss.kernels.cross_attention import KV
from miss.models.config import TextConfig
from miss.models.cross_kv import CrossKV
from miss.models.layers import TextEmbeddings, TextLayer, mix
from miss.models.packing import Packing
from miss.models.recompute import Stack


class JointEncoder(Stack):
    """BERT whose layers read an image between self-attention and MLP, where they are given one.

    All weights but the cross-attention's are shared by the two modes; the modes differ in the first token: [CLS] for
    text alone, [ENC] over an image (MISS, arXiv 2401.05163; BLIP, arXiv 2201.12086).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.cross_kv = CrossKV(config)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        image_kv: list[KV] | None = None,
        image_index: Tensor | None = None,
        seed: int | None = None,
        padded: bool = False,
    ) -> Tensor:
        """The last layer's states (R, T, C); where rows are padded, zeros stand behind their tokens.

        Args:
            ids: int64 (R, T).
            lengths: int32 (R,), each row's tokens; None where no row is padded.
            image_kv: per layer K and V (I, N, H, D) from `cross_kv.layers`; None reads the text alone.
            image_index: int32 (R,), the image of each row, non-decreasing.
            seed: dropout's seed; None drops nothing.
            padded: compute the padded positions' states too, as the original does, instead of zeros.
        """
        x, packing = self._embedded(ids, lengths, seed, padded)
        if packing is not None and image_index is not None:
            image_index = image_index[packing.row]
        for i, layer in enumerate(self.layers):
            source = None if image_kv is None else image_kv[i]
            x = self.through(layer, x, lengths, source, image_index, seed=mix(seed, i), packing=packing)
        return x if packing is None else packing.unpack(x)

    def first(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        image_kv: list[KV] | None = None,
        image_index: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The last layer's states of the first tokens, (R, C): its other rows, which nobody reads, are not computed."""
        x, packing = self._embedded(ids, lengths, seed)
        index = image_index if packing is None or image_index is None else image_index[packing.row]
        *before, last = self.layers
        for i, layer in enumerate(before):
            source = None if image_kv is None else image_kv[i]
            x = self.through(layer, x, lengths, source, index, seed=mix(seed, i), packing=packing)
        source, inner = None if image_kv is None else image_kv[len(before)], mix(seed, len(before))
        return self.through(last, x, lengths, source, image_index, seed=inner, packing=packing, first=True)

    def _embedded(
        self, ids: Tensor, lengths: Tensor | None, seed: int | None, padded: bool = False
    ) -> tuple[Tensor, Packing | None]:
        packing = None if padded else Packing.of(lengths, ids.shape[1])
        if packing is None:
            return self.embeddings(ids, seed=seed), None
        return self.embeddings(packing.pack(ids), packing.position, seed), packing
