"""Checkpoints as files.

files        which files hold the weights, and reading them
config       what config.json says, and the digest that ties it to the weights
manifest     what a packed checkpoint was made from, and the hash of every file in it
job          the work folder of a compression: committed block by block, resumed, published by one rename
merge        the blocks' files become the few shards that transformers would write
activations  hidden states in memory-mapped files
size         true bits, counted from the tensors that files store
gguf         a GGUF file as such a folder
storage      atomic writes, digests, JSON
"""
