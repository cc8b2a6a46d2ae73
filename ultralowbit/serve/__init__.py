"""Packed checkpoints in the programs that serve models.

command    the command that serves a folder, and what fits it
plugin     what vLLM calls in each of its processes
vllm       the quantization config and the Linear that vLLM builds
"""
