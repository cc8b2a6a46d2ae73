"""The only file that knows how Hugging Face decoders are built: blocks, Linears, the arguments blocks are called with.

Nothing here names an architecture. The model is built on meta; its own forward, run once with all but the first block
passing hidden states through, shows what every block is called with; blocks are then filled from the safetensors files
one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ultralowbit.checkpoint.files import Source
from ultralowbit.checkpoint.names import weight_name
from ultralowbit.errors import CheckpointError, InputError, reason
from ultralowbit.format.words import TensorSpec
from ultralowbit.nn.calls import BlockCall, CallSpy, Reached, products
from ultralowbit.nn.experts import Experts, routing_linears, separate_experts
from ultralowbit.nn.folding import Folding, why_not_foldable
from ultralowbit.nn.hf_names import cast_to, match_stored, separate, tied_names
from ultralowbit.nn.linear import PackedLinear, linear_shape
from ultralowbit.nn.original import build_on_meta, read_config, refuse_adapters, refuse_codes

MAX_UNQUANTIZED = 0.05
"""Largest share of the blocks' weights that may stay outside Linears; above it a model is refused."""


class Decoder:
    """A causal LM on meta whose blocks can be filled from `source` one at a time, with a Linear for each expert.

    dtype: the compute dtype, None for the checkpoint's; device: where blocks run; autocast: whether their products are
    made in bfloat16. specs: dtype and shape of the model's tensors by their names, as the source has them; key_of: the
    name there of each but those that are `joined` of several.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype | None, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        refuse_adapters(folder)
        self.config = read_config(folder, trust_remote_code)
        self.source = Source(folder)
        refuse_codes(self.source)
        self.dtype, self.device = dtype or self.config.dtype or torch.float32, device
        self.autocast = False
        self.folding: Folding | None = None
        try:
            self.model = build_on_meta(self.config, self.dtype, trust_remote_code)
        except Exception as e:  # as above: sizes that do not fit together fail anywhere
            raise InputError(f"transformers cannot build a causal LM from {folder}/config.json ({reason(e)})") from e
        self.blocks_name, self.blocks = find_blocks(self.model, self.config)
        self.experts = separate_experts(self.model)
        self.refuse_unquantizable()  # before the names: other experts are stored under others, in other shapes
        self.key_of: dict[str, str] = {}
        stored_as, self.joined = match_stored(self.model, self.source.specs)
        self.specs = self._match_specs(stored_as)
        start, self._of_block = f"{self.blocks_name}.", [[] for _ in self.blocks]
        for name in self.specs:
            if name.startswith(start):
                self._of_block[int(name.removeprefix(start).partition(".")[0])].append(name)

    def _match_specs(self, key_of: Mapping[str, str]) -> dict[str, TensorSpec]:
        """Name of each tensor of the model -> what the source has for it; tied ones that the source leaves out are
        absent."""
        tied = tied_names(self.model)
        # either may be the one that is stored
        key_of = {source: key_of[name] for name, source in tied.items() if name in key_of} | dict(key_of)
        specs, missing, joins = {}, [], {}
        for name, tensor in self.model.state_dict().items():
            key = key_of.get(name)
            if name in tied and tied[name] != name:
                if self._stored_alike(key, key_of.get(tied[name])):
                    continue  # stored once, under the name it is tied to
                separate(self.model, name)
                self.config.tie_word_embeddings = False
            spec = self._joined_spec(name, joins) if key is None else self.source.specs[key]
            if spec is None:
                missing.append(name)
                continue
            if spec.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{key or name} in {self.source.folder} has shape {list(spec.shape)}, config.json implies "
                    f"{list(tensor.shape)}: the two do not belong together"
                )
            specs[name] = spec
            if key is not None:
                self.key_of[name] = key
        if missing:
            raise CheckpointError(
                f"{self.source.folder} holds no tensor for {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f"; load it with transformers {_transformers_version()} and `save_pretrained` it to rewrite its names"
            )
        return specs

    def _joined_spec(self, name: str, joins: dict[Any, TensorSpec]) -> TensorSpec | None:
        """What a tensor would be that the source holds in parts; None where it does not. joins: by the parts, what is
        known of tensors of other blocks."""
        if name not in self.joined:
            return None
        joined, stored = self.joined[name], self.source.specs
        alike = id(joined.converter), tuple((p, *map(stored.get, keys)) for p, keys in joined.parts.items())
        if alike not in joins:
            try:
                joins[alike] = joined.spec(stored)
            except Exception as e:  # parts that are missing or do not fit fail anywhere in transformers' operations
                raise CheckpointError(
                    f"the {len(joined.keys)} tensors of {self.source.folder} that make {name} do not fit together "
                    f"({reason(e)}): copy or download the model again"
                ) from e
        return joins[alike]

    def _stored_alike(self, tied: str | None, key: str | None) -> bool:
        """Whether a tied tensor needs no place of its own; where the two differ, transformers does not tie them."""
        return tied in (None, key) or torch.equal(*self.source.read([tied, key]).values())

    def left_out(self) -> dict[str, tuple[int, int]]:
        """What the source holds and the model has no place for, such as a vision tower: the first two parts of a name
        -> how many tensors, and how many weights in them."""
        used = set(self.key_of.values()) | set(tied_names(self.model))
        used |= {key for joined in self.joined.values() for key in joined.keys}
        parts: dict[str, tuple[int, int]] = {}
        for name in sorted(set(self.source.specs) - used):
            part = ".".join(name.split(".")[:2])
            tensors, weights = parts.get(part, (0, 0))
            parts[part] = (tensors + 1, weights + math.prod(self.source.specs[name].shape))
        return parts

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the model's parameters are stored in, fp32 where they differ; buffers and tensors without a place do not
        count."""
        specs = (self.specs.get(name) for name, _ in self.model.named_parameters())
        dtypes = {spec.dtype for spec in specs if spec is not None and spec.dtype.is_floating_point}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def block_name(self, i: int) -> str:
        return f"{self.blocks_name}.{i}"

    def names_outside_blocks(self) -> list[str]:
        """State names of everything but the blocks: embeddings, final norm, head."""
        return [name for name in self.specs if not name.startswith(f"{self.blocks_name}.")]

    def names_of_block(self, i: int) -> list[str]:
        return self._of_block[i]

    def fold(self, seed: int, untie: bool = True) -> str | None:
        """Fold rotations into all that is read from here on; why that cannot be, as the end of a sentence, where the
        architecture does not allow it, or has a tied head that is not to be untied."""
        why_not = why_not_foldable(self, untie)
        if why_not is None:
            self.folding = Folding(self, seed)
        return why_not

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """State name -> tensor as stored, or as `folding` makes it of that."""
        if self.folding is None:
            return self._stored(names)
        norm_of = {name: self.folding.norm_of(name) for name in names}
        tensors = self._stored(list(dict.fromkeys([*names, *filter(None, norm_of.values())])))
        return {name: self.folding(name, tensors[name], tensors.get(norm_of[name])) for name in names}

    def _stored(self, names: Sequence[str]) -> dict[str, Tensor]:
        """State name -> tensor as stored; raises `CheckpointError` naming one that is not finite."""
        stored = self.source.read([self.key_of[name] for name in names if name in self.key_of])
        tensors = {name: stored[self.key_of[name]] if name in self.key_of else self._join(name) for name in names}
        for name, tensor in tensors.items():
            # the extremes carry NaN and Inf on; isfinite() would take 40 times as long, and a copy
            if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise CheckpointError(
                    f"{name} in {self.source.folder} holds NaN or Inf: the source checkpoint is damaged, nothing "
                    "can be calibrated through it"
                )
        return tensors

    def _join(self, name: str) -> Tensor:
        joined = self.joined[name]
        return joined.join(self.source.read(joined.keys))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into the model, in the compute dtype."""
        for name, tensor in tensors.items():
            value = tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)
            set_module_tensor_to_device(self.model, name, self.device, value=value)

    @contextmanager
    def filled_block(self, i: int) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        """Block i on the device, with its tensors as stored; back on meta afterwards."""
        block = self.blocks[i]
        tensors = self.read(self.names_of_block(i))
        prefix = f"{self.block_name(i)}."
        # not in the files: made when the model was built
        computed = {name: b for name, b in block.named_buffers() if prefix + name not in tensors}
        self.fill(tensors)
        _set_buffers(block, {name: buffer.to(self.device) for name, buffer in computed.items()})
        try:
            yield block, tensors
        finally:
            block.to("meta")
            _set_buffers(block, computed)
            for module in block.modules():
                if isinstance(module, Experts):
                    module.drop_linears()

    def linears(self, i: int, ignore: Sequence[str] = ()) -> dict[str, nn.Module]:
        """Full name -> Linear, Conv1D or `ExpertLinear` of block i, those that `shapes` names."""
        for module in [*self.blocks[i].modules()]:
            if isinstance(module, Experts):
                module.make_linears()
        return {name: self.model.get_submodule(name) for name in self.shapes(i, ignore)}

    def shapes(self, i: int, ignore: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
        """Full name -> (out, in) of the Linears of block i, but routers, those that the model casts to, and those whose
        full name matches a pattern in `ignore`; `InputError` where that leaves out some of a projection's experts, and
        not all."""
        apart, named = routing_linears(self.blocks[i]) | cast_to(self.blocks[i]), {}
        for name, module in self.blocks[i].named_modules():
            full = f"{self.block_name(i)}.{name}"
            if isinstance(module, Experts):
                named |= {f"{full}.{linear}": shape for linear, shape in module.linear_shapes().items()}
            elif isinstance(module, nn.Linear | Conv1D) and name not in apart:
                named[full] = linear_shape(module)
        kept = {name: shape for name, shape in named.items() if not any(fnmatch(name, p) for p in ignore)}
        packed = {weight_name(name) for name in kept} if len(kept) < len(named) else set()
        for name in named:
            if name not in kept and weight_name(name) in packed:
                raise InputError(f"ignore leaves out {name} but not all experts of its layer: give a pattern for all")
        return kept

    def refuse_unquantizable(self) -> None:
        """Raise `InputError` where more than `MAX_UNQUANTIZED` of the blocks' weights lie outside Linears."""
        total, outside = 0, {}
        for i, block in enumerate(self.blocks):
            inside = {weight_name(name) for name in self.shapes(i)}
            for name, p in block.named_parameters():
                full = f"{self.block_name(i)}.{name}"
                total += p.numel()
                if p.ndim >= 2 and full not in inside:
                    outside[full] = p
        share = sum(p.numel() for p in outside.values()) / total
        if share > MAX_UNQUANTIZED:
            name, p = max(outside.items(), key=lambda item: item[1].numel())
            raise InputError(
                f"{share:.0%} of the block weights of {self.source.folder} are not in Linear layers (the largest is "
                f"{name} {list(p.shape)}), where they cannot be packed, and leaving them in {self.config.dtype} would "
                "make the bits reported a lie, so nothing was written"
            )

    @torch.no_grad()
    def block_inputs(
        self,
        batches: Iterator[Tensor],
        sink: Callable[[int, Tensor], None],
        instead: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[BlockCall]:
        """Run the model's own forward up to block 0 on each batch [batch, length] of token ids.

        `sink(k, hidden)` takes the hidden states [batch, length, hidden] of batch k; returns how each block is called,
        which must not depend on the batch (all have one shape). `instead` holds tensors to take in the place of those
        in the files, by their state names. The embeddings are freed afterwards.
        """
        outside = [n for n in self.names_outside_blocks() if n != _head_name(self.model)]
        self.fill({**self.read(outside), **instead})
        computed = {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if not name.startswith(f"{self.blocks_name}.") and name not in self.specs
        }
        _set_buffers(self.model, {name: buffer.to(self.device) for name, buffer in computed.items()})
        with self.filled_block(0) as (first, _):
            spy = CallSpy(first, self.blocks, getattr(self.config.get_text_config(), "num_kv_shared_layers", None) != 0)
            try:
                for k, tokens in enumerate(batches):
                    with suppress(Reached):
                        self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
                    sink(k, spy.hidden)
            finally:
                spy.leave()
        calls, self._returned = [replace(call, autocast=self.autocast) for call in spy.calls], spy.returned
        if len(calls) != len(self.blocks):
            raise InputError(
                f"{self.config.model_type} runs its {len(self.blocks)} blocks {len(calls)} times in one forward pass: "
                "decoders that skip or repeat blocks cannot be streamed"
            )
        if not spy.alike:
            raise InputError(
                f"{self.config.model_type} passes its blocks more that depends on the text than the hidden states, "
                "such as per-layer embeddings or shared keys: such decoders cannot be streamed yet"
            )
        for name in outside:
            set_module_tensor_to_device(self.model, name, "meta")
        return calls

    @contextmanager
    def after_blocks(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Everything but the blocks on the device, once `block_inputs` has run.

        Yields what makes logits [batch, length, vocabulary] of the tokens [batch, length] and of the hidden states
        [batch, length, hidden] that leave the last block, with a gradient to the latter.
        """
        names = self.names_outside_blocks()
        self.fill(self.read(names))
        tied = {name: source for name, source in tied_names(self.model).items() if name not in self.specs}
        for name, source in tied.items():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[leaf] = self.model.get_parameter(source)

        def logits(tokens: Tensor, hidden: Tensor) -> Tensor:
            for block in self.blocks:
                block.forward = lambda *args, **kwargs: self._returned(hidden)
            try:
                with products(hidden, self.autocast):
                    return self.model(input_ids=tokens, use_cache=False).logits
            finally:
                for block in self.blocks:
                    del block.forward

        try:
            yield logits
        finally:
            for name in [*names, *tied]:
                set_module_tensor_to_device(self.model, name, "meta")


def _set_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._buffers[leaf] = buffer


def find_blocks(model: nn.Module, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a model, and their name in it; `InputError` where there is no list of them.

    They are looked for inside the text decoder: a vision tower may be as deep.
    """
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = decoder if isinstance(decoder, nn.Module) else model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    lists = [
        (prefix + name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(m, nn.Linear | Conv1D | PackedLinear) for m in module.modules())
    ]
    # the outermost list of the configured depth; experts and heads inside a block come later in the walk
    exact = [named for named in lists if len(named[1]) == depth]
    if not lists or (depth is not None and not exact):
        raise InputError(f"{type(model).__name__} has no list of {depth} decoder blocks made of Linear layers")
    return (exact or lists)[0]


def _head_name(model: nn.Module) -> str | None:
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def _transformers_version() -> str:
    import transformers

    return transformers.__version__
