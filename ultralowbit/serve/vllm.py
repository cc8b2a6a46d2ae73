"""The quantization config and the Linear of packed checkpoints in vLLM.

vLLM builds one Linear for q, k and v, and one for gate and up. Each of these members has its own format and tensors;
neighbours that agree in both format and input are stacked into one product. Output rows are shared out to the ranks of
tensor parallelism. Where vLLM shares out input columns instead (o_proj, down_proj), every rank keeps the whole weight
and multiplies its columns by it: an input transform mixes columns, and words hold many of them. A packed embedding or
head is unpacked as it is read: vLLM looks up in and multiplies by one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ultralowbit.checkpoint.check import is_in_block
from ultralowbit.checkpoint.config import QUANT_METHOD, module_formats, packed_formats
from ultralowbit.checkpoint.names import expert_of
from ultralowbit.errors import CheckpointError, FormatError, InputError
from ultralowbit.format.weight import Format, PackedWeight
from ultralowbit.format.words import TensorSpec
from ultralowbit.hub import resolve_model
from ultralowbit.nn.hf import check_checkpoint
from ultralowbit.nn.linear import PackedLinear

logger = init_logger(__name__)

QKV = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the members of a Linear for queries, keys and values."""


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfig):
    """The `quantization_config` of a packed checkpoint, as vLLM knows it.

    formats: the format of each packed Linear of the blocks by its name, which vLLM turns into its own.
    """

    def __init__(self, formats: Mapping[str, Format]) -> None:
        super().__init__()
        self.formats = dict(formats)
        _read_ends_dense()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        formats = module_formats(config.get("modules"), config.get("formats"))
        if expert := next(filter(expert_of, formats), None):
            raise InputError(
                f"vLLM cannot multiply by packed experts yet ({expert} is one): serve it with transformers, or export "
                "it with `ultralowbit export DIR --to dense --out PLAIN`"
            )
        return cls({name: format for name, format in formats.items() if is_in_block(name)})

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the Triton kernels multiply in bfloat16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says it all

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the whole checkpoint once, before anything is built: vLLM itself does not miss what is not there."""
        check_checkpoint(resolve_model(f"{model_name}@{revision}" if revision else model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.formats = hf_to_vllm_mapper.apply_dict(self.formats)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        formats = self._members(prefix)
        return PackedMethod(formats) if formats else UnquantizedLinearMethod()

    def _members(self, prefix: str) -> list[Format]:
        """The formats of what lies in a Linear of vLLM: one where the checkpoint holds it whole, none if not packed."""
        if prefix in self.formats:
            return [self.formats[prefix]]
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(leaf, [])]
        packed = [name for name in names if name in self.formats]
        if packed and len(packed) < len(names):
            plain = next(name for name in names if name not in packed)
            raise CheckpointError(
                f"vLLM multiplies by {packed[0]} and {plain} at once, of which only the first is packed: compress "
                "again with both of them packed, or with both of them ignored"
            )
        return [self.formats[name] for name in packed]


class PackedMethod(LinearMethodBase):
    """y = x @ decode(packed).T + bias, for x [tokens, in] and y [tokens, out of this rank].

    formats: of each member, or the only one where the checkpoint holds all members in one weight.
    """

    def __init__(self, formats: Sequence[Format]) -> None:
        self.formats = list(formats)
        self.rows: list[int] = []  # of each member on this rank
        self.stored: list[dict[str, Tensor]] = []  # of each member, by name, as the files are read

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an empty parameter for each name under which tensors are stored; they take what is loaded."""
        _leave_packed_weights_alone()
        self.rows = list(output_partition_sizes)
        if len(self.formats) == 1:
            self.formats *= len(self.rows)
        if len(self.formats) != len(self.rows):
            raise CheckpointError(
                f"{layer.prefix} has {len(self.rows)} parts in vLLM, the checkpoint holds {len(self.formats)}: this "
                "architecture cannot be served packed, export it with `ultralowbit export DIR --to dense --out PLAIN`"
            )
        self.stored = [{} for _ in self.rows]
        self.columns, self.first_column = input_size, 0
        if input_size_per_partition != input_size:
            self.first_column = layer.tp_rank * input_size_per_partition
            logger.info_once("Every rank keeps the whole packed weight of Linears whose input columns are shared out.")
        for format, rows in zip(self.formats, self.rows, strict=True):
            for name, spec in format.tensors(rows, input_size).items():
                if name not in layer._parameters:
                    empty = nn.Parameter(torch.empty(0, dtype=spec.dtype), requires_grad=False)
                    empty.weight_loader = partial(self._load, layer, name)
                    if (axis := format.row_axes[name]) is not None:
                        empty.output_dim = len(spec.shape) + axis  # for models that reorder rows
                    layer.register_parameter(name, empty)

    def _load(
        self,
        layer: nn.Module,
        name: str,
        parameter: nn.Parameter,
        tensor: Tensor,
        shard: int | str | tuple | None = None,
    ) -> None:
        """Take a stored tensor of one member, or of several consecutive ones (by default all) in one."""
        if shard is None or isinstance(shard, tuple):
            members = list(shard or range(len(self.rows)))
        else:
            members = [QKV.get(shard, shard)]
        axis = self.formats[members[0]].row_axes.get(name)
        if axis is None or len(members) == 1:
            parts = [tensor] * len(members)
        else:
            parts = tensor.split([_stored_rows(layer, member) for member in members], dim=axis)
        for member, part in zip(members, parts, strict=True):
            self._keep(layer, name, member, part, parameter.device)

    def _keep(self, layer: nn.Module, name: str, member: int, tensor: Tensor, device: torch.device) -> None:
        """Keep this rank's rows of a member's tensor."""
        format, rows = self.formats[member], self.rows[member]
        spec = format.tensors(rows, self.columns).get(name)
        axis = format.row_axes.get(name)
        if axis is not None and tensor.dim() == len(spec.shape):
            ranks_apart = tensor.shape[axis] // rows  # fewer than there are ranks where several have the same heads
            tensor = tensor.narrow(axis, layer.tp_rank * ranks_apart // layer.tp_size * rows, rows)
        if spec != (own := TensorSpec(tensor.dtype, tuple(tensor.shape))):
            raise CheckpointError(
                f"{layer.prefix}.{name} is {own} in part {member}, expected {spec or 'no such tensor'} of "
                f"{format.summary}: copy the checkpoint again"
            )
        self.stored[member][name] = tensor.to(device, copy=True).contiguous()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded, and put it together into as few products as there can be."""
        if not self.stored:
            return
        stacks: list[tuple[Format, list[dict[str, Tensor]], int]] = []
        for format, rows, tensors in zip(self.formats, self.rows, self.stored, strict=True):
            try:
                PackedWeight(format, (rows, self.columns), tensors)
                format.check_values(tensors)
            except FormatError as e:
                raise CheckpointError(f"{layer.prefix}.{e}") from e
            last = stacks[-1] if stacks else None
            if last and last[0] == format and all(torch.equal(last[1][0][n], tensors[n]) for n in format.shared):
                stacks[-1] = format, [*last[1], tensors], last[2] + rows
            else:
                stacks.append((format, [tensors], rows))
        for name in {name for tensors in self.stored for name in tensors}:
            del layer._parameters[name]
        self.stored = []
        layer.products = nn.ModuleList()
        for format, tensors, rows in stacks:
            product = PackedLinear(rows, self.columns, format, None)
            product.fill(PackedWeight(format, (rows, self.columns), format.stacked(tensors)))
            layer.products.append(product)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rest = self.columns - x.shape[-1]
        if rest:
            x = F.pad(x, (self.first_column, rest - self.first_column))
        parts = [product(x) for product in layer.products]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias


def _stored_rows(layer: nn.Module, member: int) -> int:
    """Rows of a member in the checkpoint, over all ranks."""
    if hasattr(layer, "total_num_kv_heads"):  # its output_sizes count heads that several ranks have more than once
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)[member]
        return heads * (layer.v_head_size if member == QKV["v"] else layer.head_size)
    return layer.output_sizes[member]


@cache
def _read_ends_dense() -> None:
    """Let vLLM read a packed embedding or head as the weight that the bytes mean: not all of its models say which of
    their modules these are."""
    read = DefaultModelLoader.get_all_weights

    def read_dense(self: DefaultModelLoader, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        formats = packed_formats(model_config.hf_config.to_dict())
        ends = {name: format for name, format in formats.items() if not is_in_block(name)}
        yield from _dense(read(self, model_config, model), ends, model_config.dtype)

    DefaultModelLoader.get_all_weights = read_dense


def _dense(
    weights: Iterable[tuple[str, Tensor]], formats: Mapping[str, Format], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors by name, those of some packed weights as one dense weight [out, in] each."""
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in formats}
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        format = formats.get(module)
        if format is None or part not in format.row_axes:
            yield name, tensor
            continue
        own = stored[module]
        own[part] = tensor
        if len(own) == len(format.row_axes):
            shape = (own["weight"].shape[-2], format.in_features)
            yield f"{module}.weight", PackedWeight(format, shape, stored.pop(module)).dequantize(dtype)
    if stored:
        raise CheckpointError(f"the packed weight of {next(iter(stored))} is not whole: copy the checkpoint again")


@cache
def _leave_packed_weights_alone() -> None:
    """Let vLLM's GPT-2 transpose dense weights only: Hugging Face stores those as [in, out], packed ones as others."""
    from vllm.model_executor.models.gpt2 import GPT2Model

    transpose = getattr(GPT2Model, "_transpose_conv1d", None)
    if transpose is None:  # another release: the shapes of what is loaded are checked in any case
        return

    def transpose_dense(self: GPT2Model, weights: Any) -> Any:
        for name, tensor in weights:
            yield from transpose(self, [(name, tensor)]) if tensor.is_floating_point() else [(name, tensor)]

    GPT2Model._transpose_conv1d = transpose_dense
