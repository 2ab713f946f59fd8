"""Readers of weights in Triton kernels: the file ``<format>.py`` reads the weight format of its name.

A reader file defines

    read(weight, table, rows, k, count, columns, padded, block_bytes, BITS, GROUP, SCALE, OFFSET, LEVELS)
    ROTATED      whether the format stores rotated weights, so that activations must be rotated too

``read`` is a ``triton.jit`` function. It returns the values [n, 64] of the columns k .. k + 63 of the rows ``rows`` as
float32, and a factor [n] for each row that the products are multiplied with. The values of integer formats are exact in
bfloat16, so the factor is applied after the matrix instruction.

Arguments: ``weight`` is the first byte of the matrix, or its first number; ``table`` the levels of a format with a
table; ``count`` and ``columns`` the shape of the matrix; ``padded`` its columns in memory; ``block_bytes`` the bytes of
a block of 32 rows. BITS and LEVELS describe the codes of a quantized format; the other constants in capitals are
parameters of ``grouped``. A reader ignores those that its format lacks.
"""
