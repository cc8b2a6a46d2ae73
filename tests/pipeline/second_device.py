"""A second device without hardware: `card`, whose tensors lie on the host, and which refuses what a GPU refuses.

Run as a program, it compresses a model with recipes on that device and prints what went wrong with each, as JSON. Every
operation is checked: tensors of the host and of the card do not meet, but for copies, numbers and indices. What is not
trained comes out as on the host, to the bit. In a process of its own: torch can be taught one such device, for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.cpp_extension import include_paths, library_paths

GUARD = """
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
const Device card(DeviceType::PrivateUse1, 0);
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::PrivateUse1> {
  Device getDevice() const override { return card; }
  Device exchangeDevice(Device) const override { return card; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, card); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, card); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, card); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
} hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);
}
"""
COPIES = {"aten::copy_", "aten::_to_copy", "aten::set_"}
INDEXED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


def teach_torch(folder: Path) -> None:
    """Make `card` a device of this process; what it takes is compiled into `folder`."""
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    flags = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command = ["g++", "-shared", "-fPIC", "-std=c++17", "-O0", str(source), "-o", str(library), *flags]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    torch.utils.rename_privateuse1_backend("card")
    module: Any = types.ModuleType("torch.card")
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_rng_state, module.set_rng_state = lambda device=0: torch.get_rng_state(), lambda state, device=0: None
    module.device, module.synchronize = contextlib.nullcontext, lambda *args: None
    torch._register_device_module("card", module)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def card() -> torch.device:
    return torch.device("card:0")


class CardTensor(Tensor):
    """A tensor that says it is on the card; `host` is its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> CardTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=card(), requires_grad=requires_grad,
        )  # fmt: skip
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> CardTensor:
        if id(self) not in memo:
            memo[id(self)] = CardTensor(self.host.clone(), self.requires_grad)
        return memo[id(self)]

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_tensors(index), value)

    def __repr__(self, **kwargs: Any) -> str:
        return f"CardTensor({self.host!r})"

    def tolist(self) -> list[Any]:
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def storage(self) -> Any:
        return self.host.storage()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()


def _tensors(index: Any) -> Any:
    """Lists in an index as tensors, which torch would make below the reach of Python."""
    if isinstance(index, tuple):
        return tuple(map(_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, run on the host; raises `RuntimeError` where a GPU would."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    cards = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    hosts = [tensor for tensor in tensors if not isinstance(tensor, CardTensor) and tensor.dim()]
    if cards and hosts and name not in COPIES and not (name in INDEXED and isinstance(args[0], CardTensor)):
        shapes = [tuple(tensor.shape) for tensor in hosts]
        raise RuntimeError(f"{func} on the card was given tensors of the host, of shapes {shapes}")
    device = kwargs.get("device")
    if device is not None:
        onto = torch.device(device).type == "card"
    else:
        onto = isinstance(args[0], CardTensor) if name == "aten::copy_" else bool(cards)
    kwargs_there = {k: torch.device("cpu") if k == "device" and onto else v for k, v in kwargs.items()}
    if not cards and not onto:
        return func(*args, **kwargs)
    host = lambda x: x.host if isinstance(x, CardTensor) else x  # noqa: E731
    result = func(*tree_map(host, args), **tree_map(host, kwargs_there))
    if not onto or name == "aten::_local_scalar_dense":
        return result
    wrap = lambda x: CardTensor(x) if isinstance(x, Tensor) and not isinstance(x, CardTensor) else x  # noqa: E731
    return return_and_correct_aliasing(func, args, kwargs, tree_map(wrap, result))


class Card(TorchDispatchMode):
    """Within it, tensors can be made on the card and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def _set_tensor(module: nn.Module, name: str, device: Any, value: Tensor | None = None) -> None:
    """accelerate's `set_module_tensor_to_device`, which makes a parameter of the class of the one before."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    table = parent._parameters if leaf in parent._parameters else parent._buffers
    new = torch.empty_like(table[leaf], device="meta") if value is None else value.to(device)
    table[leaf] = nn.Parameter(new, new.is_floating_point()) if table is parent._parameters else new


def adapt() -> None:
    """Replace what torch and accelerate do below the reach of Python."""
    from ultralowbit.nn import decoder
    from ultralowbit.pipeline import compress

    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return made(data, **options) if device is None else made(data, **options).to(device)

    torch.tensor = tensor
    decoder.set_module_tensor_to_device = _set_tensor
    compress.pick_device = lambda name: card()


def main(model: str, folder: str, recipes: list[dict[str, Any]]) -> dict[str, str | None]:
    """Compress with each recipe into a folder of its name; what went wrong, None where nothing did."""
    teach_torch(Path(folder))
    adapt()
    from ultralowbit.pipeline.compress import compress
    from ultralowbit.recipe import Recipe

    wrong: dict[str, str | None] = {"mixing": "the card takes tensors of the host"}
    with Card():
        x = torch.ones(3, 4).to(card())
        with contextlib.suppress(RuntimeError):
            x + torch.ones(4)
            return wrong
        wrong["mixing"] = None
        for values in recipes:
            try:
                compress(model, Recipe.model_validate(values), Path(folder) / values["name"])
                wrong[values["name"]] = None
            except Exception as e:
                places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)]
                wrong[values["name"]] = f"{type(e).__name__} at {' '.join(places[-6:])}: {str(e)[:300]}"
    return wrong


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))))
