"""The mode of MKL in which the bits of a product's row do not depend on the number of rows.

Lossless decoding in float32 rests on it. MKL reads MKL_CBWR with the first product of the process; where it has no such mode
for a processor, it takes the nearest.
"""

MKL_MODE = "AVX512,STRICT"
