"""What other programs read, made from packed checkpoints.

base    the table of exporters: a new one is a file, a line there and a test
dense   a plain transformers checkpoint
gguf    one file for llama.cpp, and what is built on it
"""
