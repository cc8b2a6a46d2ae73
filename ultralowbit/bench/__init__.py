"""What things cost, beside what they must cost; ratios are of one run.

timing       clocks, CUDA graphs, turns
models       random models in the shapes of real ones, formats to time
kernels_cpu  products on a CPU beside torch's own
kernels_gpu  products on a GPU beside cuBLAS and a copy of as many bytes
decode       tokens a second
pipeline     compressing, beside the products that cannot be avoided
quantize     methods on one block, as a multiple of GPTQ
training     a training step, as a multiple of the block's own passes
eval         measuring, as a multiple of the forward passes
"""
