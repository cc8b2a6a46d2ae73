"""What compressing large models costs with many processes, worked out from rates: nothing heavy runs.

The work is counted on the model's real shapes, as `compress --dry-run` does; the rates of a card stand here, and each
can be given as it was measured on another.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig

from ultralowbit.bench.models import write_headers
from ultralowbit.errors import InputError
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.original import read_config
from ultralowbit.pipeline.embed import planned_embeddings
from ultralowbit.pipeline.estimate import planned_size
from ultralowbit.pipeline.memory import stage_memory
from ultralowbit.pipeline.rates import Rates, seconds
from ultralowbit.pipeline.sharing import received_bytes, shared_seconds
from ultralowbit.pipeline.source import planned_formats
from ultralowbit.pipeline.workload import Workload
from ultralowbit.recipe import Recipe
from ultralowbit.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Card:
    """bf16, fp32: 1e12 flops a second of products; factors: 1e12 a second of the m^3 of each m x m Hessian; column:
    microseconds that a loop over columns takes for each; link: GB that a rank receives in a second.

    bf16 and column were measured on an H200: cuBLAS, 2048 tokens by 8192 x 28672, and the loop of `gptq-2bit` before
    loops became CUDA graphs. The others are assumed: fp32 half of an H100's nominal 67, its factors in fp64 a sixth, a
    link of 400 Gb/s.
    """

    bf16: float = 770.0
    fp32: float = 33.0
    factors: float = 11.0
    column: float = 160.0
    link: float = 50.0

    @property
    def rates(self) -> Rates:
        """In the units of estimates; files are hashed at 1 GB/s. What training takes beside products is left out."""
        return Rates(
            1e12 * self.fp32, 1e12 * self.bf16, 1e-12 / self.factors, 1e9, lambda method: (1e-6 * self.column, 0.0)
        )


LARGE: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama 70B": lambda: LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
    ),
    "DeepSeek-V3 671B": lambda: DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]),
}  # fmt: skip
"""The shapes that are worked out unless a model is given."""


def scale_bench(
    model: Path | None = None,
    recipe: str = "gptq-2bit",
    ranks: Sequence[int] = (1, 8, 64),
    card: Card = Card(),
    json_file: Path | str | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Seconds, memory and bytes received by each of so many processes, a card each, for the config.json in `model` or
    the shapes in `LARGE`. Returns, and writes to `json_file`, what `say` is told."""
    wanted = Recipe.load(recipe)
    if model is not None and not (model / "config.json").is_file():
        raise InputError(f"{model} has no config.json: give the folder of a checkpoint, or none for the shapes of two")
    configs = {name: make() for name, make in LARGE.items()} if model is None else {model.name: read_config(model)}
    say(f"{recipe}, {wanted.calibration.samples} x {wanted.calibration.length} tokens, from rates: {card}")
    rows = []
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            decoder = Decoder(write_headers(Path(folder), config), torch.bfloat16, torch.device("cpu"))
            formats = planned_formats(decoder, wanted)
            size = planned_size(decoder, {**formats, **planned_embeddings(decoder, wanted)})
            for n in ranks:
                work = Workload(decoder, wanted, formats, n)
                parts = shared_seconds(work, seconds(work, size, card.rates))
                received = received_bytes(work)
                parts |= {"waiting for sums": received / (1e9 * card.link)} if received else {}
                memory = max(sum(m.total) for m in stage_memory(work, wanted).values())
                row = {"model": name, "ranks": n, "seconds": parts, "received_bytes": received, "memory": memory}
                rows.append(row | {"file_bytes": size.total_bytes, "activation_bytes": work.files * work.activations})
                _say(rows[-1], say)
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"recipe": recipe, "card": asdict(card), "rows": rows}, indent=1) + "\n")
    return rows


def _say(row: dict[str, Any], say: Callable[[str], object]) -> None:
    processes = f"{row['ranks']} process{'es' if row['ranks'] > 1 else ''}"
    say(
        f"{row['model']}, {processes}: {format_seconds(sum(row['seconds'].values()))}, memory of a process "
        f"{format_bytes(row['memory'])}, received {format_bytes(row['received_bytes'])}, file "
        f"{format_bytes(row['file_bytes'])}, activation files {format_bytes(row['activation_bytes'])}"
    )
    say("    " + ", ".join(f"{part} {format_seconds(s)}" for part, s in row["seconds"].items() if s >= 1))
