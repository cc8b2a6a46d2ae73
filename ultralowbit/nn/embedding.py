"""Packed embeddings, and heads that multiply by the same packed weight."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ultralowbit.errors import InputError
from ultralowbit.format.weight import Format
from ultralowbit.kernels.packed_matmul import packed_matmul
from ultralowbit.nn.hf_names import cast_to, onloaded, retie, tied_names, untie, without_hook
from ultralowbit.nn.linear import PackedModule, swap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedEmbedding(PackedModule):
    """y = decode(packed)[ids] for ids [...] and y [..., columns]: rows are unpacked as they are looked up.

    What a subclass of nn.Embedding does with the rows, such as Gemma's factor, is done by `shell`: that module without
    its weight. The dtype of y is that of the shell, which the model's casts change.
    """

    def __init__(self, module: nn.Embedding, format: Format) -> None:
        super().__init__(*module.weight.shape, format)
        self.shell = copy(module)
        self.shell._parameters, self.shell._buffers = {}, dict(module._buffers)
        self.shell.padding_idx = None  # of the rows that are looked up none is padding
        self.shell.register_buffer("weight", module.weight.detach().new_empty(0, format.in_features), persistent=False)

    @property
    def num_embeddings(self) -> int:
        """Rows, of which resizing would change the number."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        at = ids.reshape(-1)
        rows = self.format.decode(self.format.rows(self._tensors(), at), self.shell.weight.dtype)
        if type(self.shell) is nn.Embedding:
            return rows.view(*ids.shape, self.in_features)
        place = torch.arange(len(at), device=ids.device).view(ids.shape)
        return functional_call(self.shell, {"weight": rows}, (place,))

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        module = without_hook(self.shell)
        module._buffers = {name: buffer for name, buffer in self.shell._buffers.items() if name != "weight"}
        module._non_persistent_buffers_set = self.shell._non_persistent_buffers_set - {"weight"}
        with onloaded(self):
            module.weight = nn.Parameter(self.packed.dequantize(dtype), requires_grad=False)
        return module

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, format={self.format.summary}"


class TiedHead(nn.Module):
    """y = x @ decode(packed).T + bias, for x [..., columns] and y [..., rows], with the packed weight of an embedding;
    it stores nothing but the bias."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple it is no submodule: the model has it as such elsewhere
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> PackedEmbedding:
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """The main stored tensor: others ask a head's weight for its device."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        with onloaded(self.embedding):
            tensors = list(self.embedding._tensors().values())
            y = packed_matmul(x.to(tensors[0].device), tensors, self.embedding._layout)
        return y if self.bias is None else y + self.bias.to(y)

    def dense(self, weight: nn.Parameter) -> nn.Linear:
        """The Linear that multiplies by the embedding's weight [rows, columns]."""
        module = nn.Linear(*weight.shape[::-1], bias=self.bias is not None, device="meta")
        module.weight = weight
        if self.bias is not None:
            with onloaded(self):
                module.bias = nn.Parameter(self.bias.to(weight.dtype), requires_grad=False)
        return module


class Ends(NamedTuple):
    """The modules on both ends of a causal LM that are packed, by name; head is None where it has the embedding's
    weight."""

    embedding: str
    head: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in self if name is not None]


def find_ends(model: PreTrainedModel) -> Ends:
    """The embedding and the head of a causal LM; raises `InputError` for those that cannot be packed."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or not isinstance(head, nn.Linear):
        raise InputError(
            f"the embeddings of {type(model).__name__} are {type(embedding).__name__} and its head "
            f"{type(head).__name__}, expected an Embedding and a Linear: leave `embeddings` out of the recipe"
        )
    names = {id(module): name for name, module in model.named_modules()}
    name, head_name = names[id(embedding)], names[id(head)]
    if strange := {name, head_name} & cast_to(model):
        raise InputError(
            f"{type(model).__name__} casts to the dtype of {min(strange)}, which has none where it is packed: leave "
            "`embeddings` out of the recipe"
        )
    is_tied = tied_names(model).get(f"{head_name}.weight") == f"{name}.weight"
    return Ends(name, None if is_tied else head_name)


def pack_embedding(model: PreTrainedModel, name: str, format: Format) -> PackedEmbedding:
    """Put a PackedEmbedding on meta where the embedding `name` is, and a TiedHead where a head is tied to it. The model
    cannot be resized then."""
    packed = PackedEmbedding(model.get_submodule(name), format)
    tied = [head.removesuffix(".weight") for head, source in tied_names(model).items() if source == f"{name}.weight"]
    swap(model, name, packed)
    for head in tied:
        swap(model, head, TiedHead(packed, model.get_submodule(head).bias))
    if tied:
        untie(model, f"{name}.weight")
    model.resize_token_embeddings = partial(_resize, packed)  # copied with the model, unlike a closure
    return packed


def unpack_embedding(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    """The inverse of `pack_embedding`: the dense embedding, and the heads that share its weight."""
    packed = model.get_submodule(name)
    dense = packed.dense(dtype)
    swap(model, name, dense)
    tied = {head: module for head, module in model.named_modules() if isinstance(module, TiedHead)}
    for head, module in tied.items():
        swap(model, head, module.dense(dense.weight))
    if tied:
        retie(model)
    del model.resize_token_embeddings


def _resize(
    packed: PackedEmbedding,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: object,
    **kwargs: object,
) -> PackedEmbedding:
    rows = packed.num_embeddings if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
    if rows != packed.num_embeddings:
        raise InputError(
            f"embeddings that are packed cannot be resized (from {packed.num_embeddings} rows to {rows}): resize the "
            "original model and compress that, or call dequantize() first"
        )
    return packed
