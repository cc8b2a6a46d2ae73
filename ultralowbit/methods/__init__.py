"""Quantization methods, one paper a file; `METHODS` is the closed table that recipes choose from."""

from ultralowbit.methods.arb_rc import ARBRC
from ultralowbit.methods.base import Method
from ultralowbit.methods.billm import BiLLM
from ultralowbit.methods.db_llm import DBLLM
from ultralowbit.methods.gptq import GPTQ
from ultralowbit.methods.pb_llm import PBLLM
from ultralowbit.methods.ptq161 import PTQ161
from ultralowbit.methods.rtn import RTN
from ultralowbit.methods.sign import Sign
from ultralowbit.methods.statistics import Need

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "sign": Sign,
    "pb_llm": PBLLM,
    "ptq161": PTQ161,
    "billm": BiLLM,
    "arb_rc": ARBRC,
    "db_llm": DBLLM,
}

__all__ = ["METHODS", "Method", "Need"]
