"""Products with packed int8, int4 and fp8 weights, and the one description of how they are packed."""

from miss.kernels.quant_linear.into import quant_linear_into
from miss.kernels.quant_linear.op import prepare, quant_embedding, quant_linear
from miss.kernels.quant_linear.packing import (
    PackedWeight,
    PackingError,
    QuantRows,
    dequantise_rows,
    from_flat,
    pack_codes,
    pack_fp8,
    pack_int4,
    pack_int8,
    pack_llm_int8,
    pack_nf4,
    packed_names,
    to_flat,
    unpack,
)
from miss.kernels.quant_linear.rows import quant_linear_rows, quant_linear_rows_quantised, quantise_rows

__all__ = [
    "PackedWeight",
    "PackingError",
    "QuantRows",
    "dequantise_rows",
    "from_flat",
    "pack_codes",
    "pack_fp8",
    "pack_int4",
    "pack_int8",
    "pack_llm_int8",
    "pack_nf4",
    "packed_names",
    "quant_embedding",
    "prepare",
    "quant_linear",
    "quant_linear_into",
    "quant_linear_rows",
    "quant_linear_rows_quantised",
    "quantise_rows",
    "to_flat",
    "unpack",
]
