"""How much the pipeline has to do for a model and a recipe."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ultralowbit.checkpoint.names import expert_of
from ultralowbit.format.weight import Format
from ultralowbit.kernels import cpu
from ultralowbit.methods.output_feedback import ROWS
from ultralowbit.methods.statistics import Need
from ultralowbit.nn.decoder import Decoder
from ultralowbit.nn.inputs import shared_inputs
from ultralowbit.pipeline.experts import at_once
from ultralowbit.pipeline.source import BATCH_TOKENS, window_length
from ultralowbit.recipe import Recipe
from ultralowbit.training.specs import Blockwise, Preprocess, Trained


class Workload:
    """How much the pipeline has to do for a model and a recipe, in so many processes."""

    def __init__(
        self,
        decoder: Decoder,
        recipe: Recipe,
        formats: dict[str, tuple[Format, tuple[int, int]]],
        ranks: int = 1,
    ) -> None:
        self.decoder, self.ranks = decoder, ranks
        self.chosen = getattr(decoder.config.get_text_config(), "num_experts_per_tok", None)  # experts of a token
        self.paired = recipe.error_correction is not None
        self.shapes = {name: shape for name, (_, shape) in formats.items()}
        self.methods = {name: recipe.method_for(name) for name in formats}
        self.with_hessian = [name for name in formats if Need.HESSIAN in self.methods[name].needs]
        self.length = window_length(recipe.calibration, decoder)
        self.recipe, self.formats = recipe, [format for format, _ in formats.values()]
        outside = [decoder.specs[name] for name in decoder.names_outside_blocks()]
        self.outside = sum(math.prod(spec.shape) for spec in outside)
        self.vocabulary = decoder.config.get_text_config().vocab_size
        measured = recipe.blockwise is not None or any(method.needs for method in self.methods.values())
        self.tokens = recipe.packed_windows * self.length if measured else 0
        self.batch = min(self.tokens, max(BATCH_TOKENS, self.length))  # tokens that run at a time, at most
        clip = recipe.calibration.clip_tokens
        self.outliers = 0 if clip is None else int(self.tokens * (1 - clip)) + 1  # tokens held back by each Hessian
        self.hidden = decoder.config.get_text_config().hidden_size
        self.activations = self.tokens * self.hidden * decoder.dtype.itemsize  # bytes of one activation file
        # two for the packed model, two for the original, the targets
        self.files = 5 if recipe.blockwise is not None else 4 if self.paired else 2
        if decoder.experts:  # what the experts of one block are given, in the original too
            self.files += 2 if self.paired else 1
        heard = [] if recipe.output_feedback is None else [n for n, _ in self.shapes.values()]
        self.kept_outputs = sum(4 * n * min(n, ROWS) for n in heard)  # bytes of what output feedback needs
        self.costed, self.heard = (  # tokens on which it is measured what Linears cost, and what outputs say
            0 if spec is None else min(spec.windows, recipe.packed_windows) * self.length
            for spec in (recipe.allocate, recipe.output_feedback)
        )
        self.backwards = max(self.costed, self.heard)  # tokens on which the blocks run backwards
        # bytes of what enters every block, kept until then
        self.depths = self.backwards * (len(decoder.blocks) + 1) * self.hidden * decoder.dtype.itemsize
        leaders = shared_inputs(decoder) if self.with_hessian else {}
        self.exact_groups = leaders is not None
        groups: dict[str, list[str]] = {}
        for name in formats:
            groups.setdefault((leaders or {}).get(name, name), []).append(name)
        measured = {*self.with_hessian}
        self.hessians = [  # `in` of each input group, and the share of tokens that reach it
            (self.shapes[names[0]][1], self.reached(names[0])) for names in groups.values() if measured & {*names}
        ]
        self.solved: dict[Any, dict[str, int]] = {}  # weights of the Linears that ranks solve at once
        placed: Counter[tuple[str, str]] = Counter()
        for leader, names in groups.items():
            together: Any = leader
            if place := expert_of(leader):  # as many experts as are measured at once
                together = place, placed[place] // at_once(self.shapes[leader][1], self.paired)
                placed[place] += len(names)
            self.solved.setdefault(together, {}).update({name: math.prod(self.shapes[name]) for name in names})
        # of all blocks, skipped Linears too: those run as well
        self.forward = {
            name: math.prod(shape) for i in range(len(decoder.blocks)) for name, shape in decoder.shapes(i).items()
        }

    @property
    def again(self) -> int:
        """Weights outside experts that a token is multiplied by once more, to see what the experts are given: those of
        blocks that have some."""
        total = 0
        for i in range(len(self.decoder.blocks)):
            shapes = self.decoder.shapes(i)
            outside = [name for name in shapes if expert_of(name) is None]
            if len(outside) < len(shapes):
                total += (2 if self.paired else 1) * sum(math.prod(shapes[name]) for name in outside)
        return total

    @property
    def runs_in_half(self) -> bool:
        """Whether the blocks' products are made in 16 bits where nothing is trained."""
        return self.decoder.autocast or self.decoder.dtype.itemsize == 2

    @property
    def sums_in_half(self) -> bool:
        """Whether statistics are sums of products of 16-bit numbers."""
        return self.decoder.autocast and cpu.has_amx()

    def autocasts(self, spec: Trained) -> bool:
        """Whether a stage that trains makes its products in bfloat16 on this device."""
        if isinstance(spec, Preprocess):
            trained = spec.rank * sum(sum(shape) for name, shape in self.shapes.items() if spec.adapts(name))
        else:  # beside latent weights the others are few
            trained = sum(math.prod(shape) for shape in self.shapes.values()) * ("latent" in spec.training.lr)
            trained //= len(self.decoder.blocks) if isinstance(spec, Blockwise) else 1
        return spec.training.autocasts(self.decoder.device, trained)

    def reached(self, name: str) -> float:
        """The share of tokens that enter a Linear: all of them, or those that are routed to an expert."""
        place = expert_of(name)
        if place is None:
            return 1.0
        count = self.decoder.experts[place[0]].count
        return min(1.0, (self.chosen or count) / count)
