"""Packed checkpoints in the programs that serve models.

plugin   what vLLM calls in each of its processes, and the command that serves a folder
vllm     the quantization config and the Linear that vLLM builds
"""
