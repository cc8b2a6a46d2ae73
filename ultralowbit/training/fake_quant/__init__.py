"""Packed weights as parameters, whose values are at every step those of the bytes that they pack to.

linear     `FakeQuantLinear`, which stands in a model where a Linear was, and what it trains
segments   how each kind of segment is fake-quantized: `FAKE_QUANT`, with a line for each that can be trained
planes     planes with fixed bits and trained scales
latent     planes whose bits are the code of a trained latent weight
ints       integer codes, fixed or of a latent weight, on a trained grid
transform  the factors of input columns
rounding   roundings that pass gradients, and other steps that segments share
tiles      a weight made some rows at a time, with a gradient that makes it again
"""
