"""Folding: rotations of the residual stream, and of the values in each head, that are in the weights and cost nothing
when the model runs.

Ashkboos et al.: QuaRot, NeurIPS 2024, arXiv 2404.00456, section 4, stage 1; Liu et al.: SpinQuant, ICLR 2025, arXiv
2405.16406, whose R1 and R2 these are, random and not learned. RMSNorm commutes with an orthogonal R once its gains g
are in the Linears that read it (Ashkboos et al.: SliceGPT, ICLR 2024, arXiv 2401.15024):

    W (g * norm(h)) = (W diag(g) R) norm(R^T h)

What reads the residual stream becomes W diag(g) R, what writes it R^T W and R^T b, the embedding E R and the head
E diag(g) R: a head that was tied to the embedding then has a weight of its own. Within attention a head's values are
P^T v, and the columns of o_proj that read them W P. What q, k, gate and up make stays as it is, and so does what enters
down_proj, behind a nonlinearity. Unlike QuaRot no Hadamard matrix is multiplied online across heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ultralowbit.checkpoint.names import weight_name
from ultralowbit.kernels.hadamard import block_hadamard
from ultralowbit.nn.hf_names import separate, tied_names

if TYPE_CHECKING:
    from ultralowbit.nn.decoder import Decoder

FOLDABLE = {
    "llama": 0.0, "mistral": 0.0, "mixtral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "qwen3_moe": 0.0, "gemma": 1.0,
    "phi3": 0.0, "smollm3": 0.0, "granite": 0.0,
}  # fmt: skip
"""transformers' `model_type` -> what is added to the weights of its norms to make gains."""

_ATTENTION, _MLP = "input_layernorm", "post_attention_layernorm"
_READERS = {
    "self_attn.q_proj": _ATTENTION, "self_attn.k_proj": _ATTENTION, "self_attn.v_proj": _ATTENTION,
    "self_attn.qkv_proj": _ATTENTION,
    "mlp.gate_proj": _MLP, "mlp.up_proj": _MLP, "mlp.gate_up_proj": _MLP, "mlp.gate": _MLP,
    "mlp.experts.gate_up_proj": _MLP,
}  # fmt: skip
"""What reads the residual stream -> the norm in between; a mixture's router, `mlp.gate`, too."""
_WRITERS = ("self_attn.o_proj", "mlp.down_proj", "mlp.experts.down_proj")
_OTHERS = (_ATTENTION, _MLP, "self_attn.q_norm", "self_attn.k_norm")
_ROWS = 1 << 13
"""Rows of the embedding and the head that are rotated at a time."""


class Rotation:
    """x [..., n] -> x R, orthonormal, for each n of the last axis: R = D (C x H), a Kronecker product, for n = m 2^a.

    H is the Hadamard matrix of 2^a; C, of the odd m, Hartley's cas(2 pi j k / m) / sqrt(m) (Bracewell: Discrete Hartley
    transform, J. Opt. Soc. Am. 73, 1983), orthogonal with entries of one magnitude up to sqrt(2); D random signs.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.power = n, n & -n
        generator = torch.Generator().manual_seed(seed)
        self.signs = 1.0 - 2 * torch.randint(2, (n,), generator=generator).to(torch.float32)  # [n]
        m = n // self.power
        angle = 2 * math.pi / m * (torch.outer(torch.arange(m), torch.arange(m)) % m).double()
        self.odd = ((angle.cos() + angle.sin()) * m**-0.5).float()  # [m, m]

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (-1, self.n)) * self.signs.to(x)
        parts = block_hadamard(parts, self.power).unflatten(-1, (-1, self.power))  # [..., m, 2^a]
        return (self.odd.to(x) @ parts).reshape(x.shape)


class Folding:
    """What tensors of a decoder become, by their state names: a function of each and of the gains of one norm.

    folded: the modules whose inputs are then rotated, by name; untied: the head was tied to the embedding. The decoder,
    which is of a foldable architecture, gets a head with a weight of its own.
    """

    def __init__(self, decoder: Decoder, seed: int) -> None:
        config, model = decoder.config, decoder.model
        names = {id(module): name for name, module in model.named_modules()}
        self.blocks_name, self.device = decoder.blocks_name, decoder.device
        self.embedding, self.head = (
            names[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        self.norm = names[id(model.get_decoder().norm)]
        self.offset = FOLDABLE[config.model_type]
        heads = config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.kv_rows = self.head_size * (getattr(config, "num_key_value_heads", None) or heads)
        self.residual, self.values = Rotation(config.hidden_size, seed), Rotation(self.head_size, seed + 1)
        self.untied = _untie(decoder, self.head, self.embedding)
        linears = (name for i in range(len(decoder.blocks)) for name in decoder.shapes(i))
        self.folded = frozenset([self.embedding, self.head, *(name for name in linears if self._reads_rotated(name))])

    def norm_of(self, name: str) -> str | None:
        """The weight whose gains the columns of a tensor take; None where they take none."""
        module, is_bias = _module(name)
        if module == self.head and not is_bias:
            return f"{self.norm}.weight"
        block, local = self._local(module)
        return f"{block}.{_READERS[local]}.weight" if local in _READERS and not is_bias else None

    @torch.no_grad()
    def __call__(self, name: str, tensor: Tensor, norm: Tensor | None) -> Tensor:
        """What a tensor becomes, in fp32 and then in the dtype that it is stored in; norm: what `norm_of` names."""
        if not tensor.is_floating_point():
            return tensor
        block, _ = self._local(_module(name)[0])
        rows = 1 if tensor.ndim == 3 else len(tensor) if block else _ROWS  # an expert, a block's weight, rows outside
        gains = None if norm is None else norm.to(self.device, torch.float32) + self.offset  # [in]
        parts = [self._fold(name, part.to(self.device, torch.float32), gains) for part in tensor.split(rows)]
        return torch.cat([part.to(tensor.device, tensor.dtype) for part in parts])

    def _fold(self, name: str, x: Tensor, gains: Tensor | None) -> Tensor:
        """x [..., out, in] of a weight, [out] of a bias or norm."""
        module, is_bias = _module(name)
        _, local = self._local(module)
        if module == self.norm or local in (_ATTENTION, _MLP):
            return torch.full_like(x, 1 - self.offset)
        if gains is not None:
            x = x * gains
        if not is_bias and (local in _READERS or module in (self.embedding, self.head)):
            x = self.residual(x)
        if not is_bias and local == "self_attn.o_proj":
            x = self.values(x)
        if local in ("self_attn.v_proj", "self_attn.qkv_proj"):
            others, values = x.split([len(x) - self.kv_rows, self.kv_rows])
            x = torch.cat([others, _along_rows(values, self.values)])
        return _along_rows(x, self.residual) if local in _WRITERS else x

    def _reads_rotated(self, linear: str) -> bool:
        _, local = self._local(_module(weight_name(linear))[0])
        return local in _READERS or local == "self_attn.o_proj"

    def _local(self, module: str) -> tuple[str, str]:
        """The block that a module is in, and its name there; two empty ones outside blocks."""
        prefix = f"{self.blocks_name}."
        if not module.startswith(prefix):
            return "", ""
        i, _, local = module.removeprefix(prefix).partition(".")
        return prefix + i, local


def _untie(decoder: Decoder, head: str, embedding: str) -> bool:
    """Give a tied head, by name, a weight of its own, for now the embedding's; False where the files hold one."""
    own, source = f"{head}.weight", f"{embedding}.weight"
    if tied_names(decoder.model).get(own) == source:
        separate(decoder.model, own)
        decoder.config.tie_word_embeddings = False
    if own in decoder.specs:
        return False
    decoder.specs[own], decoder.key_of[own] = decoder.specs[source], decoder.key_of[source]
    return True


def give_folded(model: nn.Module, decoder: Decoder) -> None:
    """Put what a folded decoder reads into the same model in memory, in its dtypes; a tied head gets its own weight."""
    for name in decoder.specs:
        owner, _, leaf = name.rpartition(".")
        weights, (weight,) = model.get_submodule(owner)._parameters, decoder.read([name]).values()
        weights[leaf] = nn.Parameter(weight.to(weights[leaf]), requires_grad=False)


def why_not_foldable(decoder: Decoder, untie: bool) -> str | None:
    """Why rotations cannot be folded into a model, as the end of a sentence; None where they can. untie: whether a tied
    head may get a weight of its own."""
    model, kind = decoder.model, decoder.config.model_type
    if kind in FOLDABLE and not type(model).__module__.startswith("transformers.models."):
        return "its code is not that of transformers"
    if kind in FOLDABLE:
        strange = next((n for n in _inside(decoder) if n not in (*_READERS, *_WRITERS, *_OTHERS)), None)
        if strange is not None:
            return f"what {strange} does in its blocks is not known"
        return None if untie or not tied_names(model) else "its head is tied to the embedding, and is to stay so"
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        return "its LayerNorm takes the mean off, which rotations do not keep"
    if any(name.endswith("post_feedforward_layernorm") for name in _inside(decoder)):
        return "norms stand between its Linears and the residual stream that they write, and their gains do not rotate"
    return f"it is none of {', '.join(FOLDABLE)}"


def _inside(decoder: Decoder) -> Iterable[str]:
    """The modules in blocks that hold tensors, by their names there."""
    for i in range(len(decoder.blocks)):
        for name in decoder.names_of_block(i):
            yield _module(name)[0].removeprefix(f"{decoder.block_name(i)}.")


def _module(tensor: str) -> tuple[str, bool]:
    """The module that a tensor of this name is in, for experts their tensor itself; and whether it is a bias."""
    return tensor.removesuffix(".weight").removesuffix(".bias"), tensor.endswith("bias")


def _along_rows(x: Tensor, rotation: Callable[[Tensor], Tensor]) -> Tensor:
    """R^T x for x [..., rows, columns] or [rows]."""
    return rotation(x) if x.ndim == 1 else rotation(x.mT).mT
