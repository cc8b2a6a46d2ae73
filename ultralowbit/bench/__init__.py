"""Benchmarks: each sets what something costs beside what it must cost, in ratios within one run.

gpu          all of what follows on one GPU, in a few minutes and one folder
gpu_parts    the parts of that
gpu_targets  what a GPU is to reach
timing       clocks, CUDA graphs, runs that take turns
models       random models in the shapes of real ones, and formats to time
kernels_cpu  products on a CPU beside torch's own
kernels_gpu  products on a GPU beside cuBLAS and a copy of as many bytes
tuning       the tiles of a GPU that are the fastest
decode       tokens a second
pipeline     compressing, beside the products that cannot be avoided
quantize     methods on one block, as a multiple of GPTQ
training     a training step, as a multiple of the block's own passes
eval         measuring, as a multiple of the forward passes
"""
