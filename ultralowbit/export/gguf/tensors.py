"""The tensors of a GGUF file: their names, their block types, and their bytes, a tensor at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ultralowbit.checkpoint.files import Source
from ultralowbit.errors import CheckpointError, InputError
from ultralowbit.export.gguf.architectures import Architecture
from ultralowbit.export.gguf.blocks import BlockType, Eight, Four, Multiples, Signs, Two, exact_type, is_product
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.nn.hf_names import match_keys, tied_names
from ultralowbit.nn.linear import PackedModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

F32, F16 = 0, 1
"""Numbers of ggml's types that are no blocks."""

_RECIPES = {"q1_0": Signs(), "q2_0": Two(), "q4_0": Four()}
"""Recipes -> the block types that hold their weights exactly."""


@dataclass(frozen=True)
class Stored:
    """One tensor of the file: type is ggml's number, shape that of the weight; `read` makes its bytes, in that shape or
    as rows of blocks."""

    name: str
    shape: tuple[int, ...]
    type: int
    bytes: int
    read: Callable[[], np.ndarray]
    format: Format | None = None
    """Of a packed weight, in the checkpoint."""
    block: BlockType | None = None
    """The block type that it gets."""

    @property
    def packed_bytes(self) -> int:
        """What a packed weight takes in the checkpoint."""
        return self.format.nbytes(*self.shape)


class Tensors:
    """The tensors of a model as llama.cpp names and stores them.

    model: the checkpoint `folder` on meta, its packed modules in place. Every tensor is planned on construction, from
    shapes and the scales and zero points of packed weights: raises `InputError` for one that the file cannot hold.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path, architecture: Architecture, q8_embeddings: bool, dequantize: bool
    ) -> None:
        import gguf

        self.config, self.architecture = model.config, architecture
        self.q8_embeddings, self.dequantize = q8_embeddings, dequantize
        self.source = Source(folder)
        self.key_of = match_keys(model, self.source.specs)
        kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self.names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
        self.stored = [*self._plan(model)]

    def _plan(self, model: PreTrainedModel) -> Iterator[Stored]:
        modules = {n: module for n, module in model.named_modules() if isinstance(module, PackedModule)}
        inside = {f"{n}.{tensor}" for n, module in modules.items() for tensor in module.format.row_axes}
        blocks = {} if self.dequantize else {name: self._block(name, module) for name, module in modules.items()}
        if unfit := {name: modules[name].format for name, block in blocks.items() if block is None}:
            raise _inexact(unfit)
        for name, tensor in model.state_dict().items():
            module = modules.get(name.removesuffix(".weight"))
            if module is not None and name.endswith(".weight"):
                yield self._packed(name, module, blocks.get(name.removesuffix(".weight")))
            elif name not in inside and name in self.key_of:
                yield self._plain(name, tuple(tensor.shape))
            elif name not in inside and name not in tied_names(model):
                raise CheckpointError(f"{name} is missing in {self.source.folder}: copy the checkpoint again")
        for name, values in self.architecture.rope_tensors(self.config).items():
            yield Stored(name, tuple(values.shape), F32, values.nbytes, values.numpy)

    def _name(self, name: str) -> str:
        """llama.cpp's name of a tensor."""
        own = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None or (name.endswith(".bias") and name.split(".")[-2] not in self.architecture.biases):
            raise InputError(
                f"{name} has no place in llama.cpp's code for {self.architecture.name}: export to dense instead"
            )
        return own

    def _block(self, name: str, module: PackedModule) -> BlockType | None:
        """The block type that holds a packed module's weight exactly; None where none does."""
        if not is_product(module.format):
            return None
        shape = (module.out_features, module.in_features)
        return exact_type(Multiples.of(self._weight(f"{name}.weight", module.format, shape)))

    def _packed(self, name: str, module: PackedModule, block: BlockType | None) -> Stored:
        shape = (module.out_features, module.in_features)
        if block is None:
            read = partial(self._dequantized, name, module.format, shape)
            return Stored(self._name(name), shape, F16, 2 * math.prod(shape), read, module.format)
        read = partial(self._blocks, name, module.format, shape, block)
        return Stored(self._name(name), shape, block.number, block.bytes_of(shape), read, module.format, block)

    def _plain(self, name: str, shape: tuple[int, ...]) -> Stored:
        if len(shape) == 1:
            return Stored(self._name(name), shape, F32, 4 * shape[0], partial(self._vector, name))
        if self.q8_embeddings and _is_outside(name):
            block = Eight()
            if shape[1] % block.size:
                raise InputError(
                    f"{name} has rows of {shape[1]} columns, which --embeddings q8_0 cannot store in blocks of "
                    f"{block.size}: leave it out"
                )
            return Stored(self._name(name), shape, block.number, block.bytes_of(shape), partial(self._eight_bits, name))
        return Stored(self._name(name), shape, F16, 2 * math.prod(shape), partial(self._half, name))

    def _weight(self, name: str, format: Format, shape: tuple[int, int]) -> PackedWeight:
        prefix = self.key_of[name].removesuffix("weight")
        stored = self.source.read([prefix + suffix for suffix in format.row_axes])
        weight = PackedWeight(format, shape, {suffix: stored[prefix + suffix] for suffix in format.row_axes})
        format.check_values(weight.tensors)
        return weight

    def _rows(self, name: str, values: Tensor) -> Tensor:
        """Rows in llama.cpp's order."""
        order = self.architecture.row_order(name, len(values), self.config)
        return values if order is None else values[order]

    def _blocks(self, name: str, format: Format, shape: tuple[int, int], block: BlockType) -> np.ndarray:
        encoded = block.encode(Multiples.of(self._weight(name, format, shape)))
        return self._rows(name, encoded).contiguous().numpy()

    def _dequantized(self, name: str, format: Format, shape: tuple[int, int]) -> np.ndarray:
        return self._halves(name, self._weight(name, format, shape).dequantize())

    def _half(self, name: str) -> np.ndarray:
        return self._halves(name, self._tensor(name))

    def _halves(self, name: str, values: Tensor) -> np.ndarray:
        halves = values.half()
        if not halves.isfinite().all():
            raise InputError(
                f"{name} holds {values.abs().max().item():.3g}, and 16-bit floats end at 65504: no file of llama.cpp "
                "with F16 weights can hold this model, export to dense instead"
            )
        return self._rows(name, halves).contiguous().numpy()

    def _eight_bits(self, name: str) -> np.ndarray:
        import gguf

        return gguf.quants.quantize(self._tensor(name).numpy(), gguf.GGMLQuantizationType.Q8_0)

    def _vector(self, name: str) -> np.ndarray:
        values = self._tensor(name)
        if name.endswith("norm.weight"):
            values += self.architecture.norm_offset
        return self._rows(name, values).contiguous().numpy()

    def _tensor(self, name: str) -> Tensor:
        """A tensor that is not packed, fp32."""
        key = self.key_of[name]
        return self.source.read([key])[key].float()


def _is_outside(name: str) -> bool:
    """Whether a weight is the embedding or the head, in all architectures that llama.cpp is given."""
    return name.removesuffix(".weight").endswith(("embed_tokens", "lm_head"))


def fitting_recipe(bits: float) -> tuple[str, BlockType]:
    """The recipe nearest to so many bits a code, and the block type that holds its weights exactly."""
    enough = [(recipe, kind) for recipe, kind in _RECIPES.items() if kind.bits > bits]
    return enough[0] if enough else ("q4_0", _RECIPES["q4_0"])


def _inexact(unfit: Mapping[str, Format]) -> InputError:
    """The error for packed weights, by name, that no block type holds, with what makes all of them fit."""
    inside = {name: format for name, format in unfit.items() if not _is_outside(name)}
    undivided = {name: format for name, format in unfit.items() if format.in_features % 32}
    name, format = next(iter((undivided or inside or unfit).items()))
    if undivided:
        remedy = f"all of them hold blocks of 32 to 128 columns, and its rows have {format.in_features}"
    elif inside:
        recipe, _ = fitting_recipe(statistics.fmean(format.claimed_bits for format in inside.values()))
        remedy = f"compress the model again with `--recipe {recipe}`, whose weights they do hold"
    else:
        remedy = "compress the model again with `--set 'embeddings={method: ints, group: 32, symmetric: true}'`"
    what = name if len(unfit) == 1 else f"{len(unfit)} of the packed weights, such as {name},"
    return InputError(
        f"no block type of llama.cpp holds {what} exactly as stored, {format.summary}: {remedy}, or give --dequantize "
        "to write 16 bits a weight"
    )


def write(path: Path, architecture: Architecture, describe: Callable[[Any], None], tensors: Tensors, step: Any) -> None:
    """Write the file: what `describe` adds to its keys, then the tensors one after another; `step` gets their bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        describe(writer)
        for tensor in tensors.stored:
            # a type is given by its number and a shape in weights: the package does not know all types yet
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.stored:
            writer.write_tensor_data(tensor.read())
            step(tensor.bytes)
    finally:
        writer.close()
