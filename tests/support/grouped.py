"""The instances of the format ``grouped`` that files need, named by the files' own types."""

from __future__ import annotations

FILE_TYPES = {
    "Q4_0": "grouped",
    "Q4_1": "grouped:offset=value",
    "Q8_0": "grouped:bits=8",
    "Q5_0": "grouped:bits=5",
    "Q5_1": "grouped:bits=5:offset=value",
    "Q4_K": "grouped:scale=super:offset=value",
    "Q5_K": "grouped:bits=5:scale=super:offset=value",
    "Q6_K": "grouped:bits=6:group=16:scale=super",
    "Q3_K": "grouped:bits=3:group=16:scale=super",
    "Q2_K": "grouped:bits=2:group=16:scale=super4:offset=value",
    "IQ4_NL": "grouped:levels=iq4_nl",
    "IQ4_XS": "grouped:scale=super:levels=iq4_nl",
    "MXFP4": "grouped:scale=bfloat16:levels=mxfp4",
    "NF4": "grouped:group=64:scale=float32:levels=nf4",
    "FP4": "grouped:group=64:scale=float32:levels=fp4",
    "GPTQ": "grouped:group=128:offset=zero",
    "GPTQ, 32 columns": "grouped:scale=bfloat16:offset=zero",
    "GPTQ, 3 bits": "grouped:bits=3:group=128:offset=zero",
    "GPTQ, 8 bits": "grouped:bits=8:group=128:offset=zero",
    "GPTQ, act-order": "grouped:group=64:offset=zero:order=act",
    "AWQ": "grouped:group=64:offset=zero",
    "compressed-tensors, 4 bits": "grouped:group=128:scale=bfloat16",
    "compressed-tensors, 8 bits": "grouped:bits=8:group=128:scale=bfloat16",
}

TEXTS = tuple(FILE_TYPES.values())
"""All of them as format names."""

KINDS = tuple(
    FILE_TYPES[name]
    for name in ("Q4_0", "Q8_0", "Q5_K", "Q6_K", "Q2_K", "IQ4_XS", "NF4", "GPTQ, 3 bits", "GPTQ, act-order")
)
"""One for each code path of the kernels: bits, groups of 16 columns, tables, offsets, and the order of columns."""
