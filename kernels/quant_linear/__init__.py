"""Products with packed int8 and int4 weights, and the one description of how they are packed."""

from miss.kernels.quant_linear.op import quant_embedding, quant_linear
from miss.kernels.quant_linear.packing import (
    PackedWeight,
    PackingError,
    QuantRows,
    dequantise_rows,
    from_flat,
    pack_codes,
    pack_int4,
    pack_int8,
    packed_names,
    quantise_rows,
    to_flat,
    unpack,
)

__all__ = [
    "PackedWeight",
    "PackingError",
    "QuantRows",
    "dequantise_rows",
    "from_flat",
    "pack_codes",
    "pack_int4",
    "pack_int8",
    "packed_names",
    "quant_embedding",
    "quant_linear",
    "quantise_rows",
    "to_flat",
    "unpack",
]
