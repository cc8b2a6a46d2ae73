"""How a block of columns is rounded, inside the loop that `compensate` runs over a weight.

ints            uniform grids of integers
signs           sign planes
alternating     sums of sign planes, codes and scales by turns
partly_binary   salient weights as integers, the others as signs
"""
