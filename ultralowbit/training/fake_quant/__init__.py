"""Packed weights that can be trained: what they compute is always what the bytes they pack to mean.

linear      a Linear whose packed weight is trained
segments    which kind of segment is trained how
planes      latent      ints       the kinds: scales of fixed signs, signs of latent weights, grids of codes
transform   the input transform
rounding    tiles       roundings that pass gradients; a weight made some rows at a time
"""
