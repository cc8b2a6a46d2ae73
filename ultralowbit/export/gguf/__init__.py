"""One file that llama.cpp, and what is built on it, reads: GGUF.

exporter       the whole way, and an Ollama Modelfile beside the file
blocks         which block types of llama.cpp hold a packed weight exactly, and its bytes in them
tensors        the tensors of the file, a tensor at a time
architectures  what llama.cpp's code for an architecture computes, and the keys that it reads
vocabulary     the tokenizer
"""
