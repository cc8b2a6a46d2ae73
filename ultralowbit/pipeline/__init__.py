"""From a model and a recipe to a packed checkpoint.

compress   the whole run
source     what it reads: the model, the formats that a recipe gives its Linears, texts in its tokens
stream     block after block: statistics, packing, training, commit
collect    statistics of what enters a Linear
quantize   one Linear packed
write      the finished checkpoint
estimate   bits, memory, disk and time to expect, before anything runs
workload   how much there is to do; rates: how fast this machine does it
verify     is it still what was written, and does the run repeat?
"""
