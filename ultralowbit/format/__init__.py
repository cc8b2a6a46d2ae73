"""How a packed weight is stored: shared by methods, files, kernels and the loader.

weight     `Format` (how one weight is stored), `PackedWeight` (its bytes), and the tables of segments and outliers
segment    the contract of a part: what a new kind of segment or outliers has to say of itself
planes     segments of sign planes, one bit a weight and plane
ints       segments of integer codes of 2, 3, 4 or 8 bits
salient    segments of signs whose scales depend on whether a column is salient
outliers   single weights at 8 bits in the place of what the segments say
transform  what the inputs of a weight go through first
words      fields of a few bits in int16 words, and the fp16 scales beside them
testing    random packed weights in any format
"""
