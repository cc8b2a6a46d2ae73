"""Models in memory.

decoder    how Hugging Face decoders are built: blocks, Linears, what blocks are called with
inputs     which Linears share an input
linear     a Linear whose weight stays packed
fused      packed Linears that share an input, multiplied at once
lora       adapters of peft on packed Linears
quantizer  what transformers is told of packed checkpoints
hf_names   what transformers does not document
hf         `load`
"""
