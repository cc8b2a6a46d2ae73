"""Post-training quantization of causal language models to 1-2 true bits per weight.

Importing it registers the packed format with transformers: `AutoModelForCausalLM.from_pretrained(DIR)` then works.
"""

from importlib.metadata import version

from ultralowbit.nn.hf import load
from ultralowbit.pipeline.compress import compress
from ultralowbit.recipe import Recipe

__version__ = version("ultralowbit")

__all__ = ["Recipe", "__version__", "compress", "load"]
