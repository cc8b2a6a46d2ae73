"""A second device without hardware: `card`, whose tensors lie on the host, and which refuses what a GPU refuses.

Run as a program, it compresses a model with recipes, on that device or on the host, then does all else that can be done
with a checkpoint, and prints what came of each as JSON. On the card every operation is checked: tensors of the host and
of the card do not meet, but for copies, numbers and indices. What is not trained comes out as on the host, to the bit.
In a process of its own: torch can be taught one such device, for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import traceback
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
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


def mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """What an operation is given, or gives, with each value changed: pytrees would take most of the time."""
    if isinstance(x, list | tuple):
        return type(x)([mapped(change, value) for value in x])
    return change(x)


@cache
def traits(func: Any) -> tuple[str, bool, bool]:
    """Of an operation its name, whether tensors of the host and of the card meet in it, and whether what it returns
    shares memory with what it is given."""
    name = func._schema.name
    return name, name in COPIES, any(returned.alias_info for returned in func._schema.returns)


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, run on the host; raises `RuntimeError` where a GPU would."""
    name, mixes, shares = traits(func)
    tensors: list[Tensor] = []
    host = lambda x: _host(x, tensors)  # noqa: E731
    args_there, kwargs_there = mapped(host, tuple(args)), {key: mapped(host, value) for key, value in kwargs.items()}
    cards = any(isinstance(tensor, CardTensor) for tensor in tensors)
    if cards and not mixes and not (name in INDEXED and isinstance(args[0], CardTensor)):
        hosts = [tensor for tensor in tensors if not isinstance(tensor, CardTensor) and tensor.dim()]
        if hosts:
            shapes = [tuple(tensor.shape) for tensor in hosts]
            raise RuntimeError(f"{func} on the card was given tensors of the host, of shapes {shapes}")
    device = kwargs.get("device")
    if device is not None:
        onto = torch.device(device).type == "card"
    else:
        onto = isinstance(args[0], CardTensor) if name == "aten::copy_" else cards
    if not cards and not onto:
        return func(*args, **kwargs)
    if device is not None and onto:
        kwargs_there["device"] = torch.device("cpu")
    result = func(*args_there, **kwargs_there)
    if not onto or name == "aten::_local_scalar_dense":
        return result
    result = mapped(_card, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if shares else result


def _host(x: Any, tensors: list[Tensor]) -> Any:
    """The values of a tensor; all tensors are noted."""
    if isinstance(x, Tensor):
        tensors.append(x)
    return x.host if isinstance(x, CardTensor) else x


def _card(x: Any) -> Any:
    return CardTensor(x) if isinstance(x, Tensor) and not isinstance(x, CardTensor) else x


class Card(TorchDispatchMode):
    """Within it, tensors can be made on the card and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """Within it, `torch.tensor` makes tensors of the card from numbers: on the host, and then moves them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{k: v for k, v in kwargs.items() if k != "device"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _set_tensor(module: nn.Module, name: str, device: Any, value: Tensor | None = None) -> None:
    """accelerate's `set_module_tensor_to_device`, which makes a parameter of the class of the one before."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    table = parent._parameters if leaf in parent._parameters else parent._buffers
    new = torch.empty_like(table[leaf], device="meta") if value is None else value.to(device)
    table[leaf] = nn.Parameter(new, new.is_floating_point()) if table is parent._parameters else new


def adapt() -> None:
    """Replace what accelerate does below the reach of Python, and let every command choose the card."""
    from ultralowbit import system

    system.pick_device = lambda name: card()  # before others import it from there
    from ultralowbit.nn import decoder

    decoder.set_module_tensor_to_device = _set_tensor


def compressions(
    model: str, folder: Path, recipes: list[dict[str, Any]], device: torch.device
) -> dict[str, Callable[[], None]]:
    """A compression with each recipe into a folder of its name."""
    from ultralowbit.pipeline.compress import compress
    from ultralowbit.pipeline.verify import verify
    from ultralowbit.recipe import Recipe

    def run(values: dict[str, Any]) -> None:
        compress(model, Recipe.model_validate(values), folder / values["name"], device=str(device))
        if problems := verify(folder / values["name"]):
            raise ValueError("; ".join(problems))

    return {values["name"]: partial(run, values) for values in recipes}


def uses(model: str, packed: Path, text: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What can be done with a packed checkpoint, by name; each returns what compares with another device's."""
    from ultralowbit.eval.evaluate import Wanted, evaluate_models
    from ultralowbit.eval.generation import generate
    from ultralowbit.eval.runner import open_model
    from ultralowbit.hub import open_tokenizer
    from ultralowbit.nn.fused import fuse
    from ultralowbit.nn.hf import load
    from ultralowbit.pipeline.compress import compress
    from ultralowbit.pipeline.verify import rerun, verify
    from ultralowbit.progress import Silent
    from ultralowbit.recipe import Recipe
    from ultralowbit.report.comparison import write_comparison
    from ultralowbit.report.run import Texts, compress_and_measure

    ids = torch.arange(4, 20)[None]

    def logits(dtype: torch.dtype, fused: bool = False) -> list[float]:
        net = load(packed, dtype=dtype).to(device)
        if fused and not fuse(net):
            raise ValueError("nothing was fused")
        return net(ids.to(device)).logits.float().cpu().flatten().tolist()

    def evaluated() -> list[float]:
        wanted = Wanted((text,), fidelity=model, context=32, max_tokens=640)
        rows = evaluate_models([str(packed)], wanted, device=str(device), watch=Silent()).results
        return [rows[0].metrics["perplexity"][0].nll, *(rows[1].metrics[m][0].to_dict()[k] for m, k in FIGURES.items())]

    def written() -> str:
        net = open_model(packed, device, torch.float32, fuse=True)
        return generate(net, open_tokenizer(packed), "a b c", max_new_tokens=12)

    def sampled() -> int:
        net = open_model(packed, device, torch.float32)
        return len(generate(net, open_tokenizer(packed), "a b c", max_new_tokens=12, temperature=0.8))

    def measured() -> list[float]:
        recipe = Recipe.load(str(packed / "recipe.yaml"), [f"calibration.source={text}"])
        out = packed.parent / "measured"
        report = compress_and_measure(
            model, recipe, out, Texts((text,), 32, 640), device=str(device), watch=Silent(), command=None
        )
        write_comparison([out], packed.parent / "comparison")
        return report.packed.divergence_by_depth.kl

    def resumed() -> bool:
        """A run that is interrupted after its first block, and goes on."""

        recipe = Recipe.load(str(packed / "recipe.yaml"), [f"calibration.source={text}"])

        class Interrupted(Silent):
            def say(self, line: str) -> None:
                raise KeyboardInterrupt

        try:
            compress(model, recipe, packed.parent / "resumed", device=str(device), progress=Interrupted())
        except KeyboardInterrupt:
            compress(model, recipe, packed.parent / "resumed", device=str(device))
            first, again = (packed.parent / name / "model.safetensors" for name in (packed.name, "resumed"))
            return first.read_bytes() == again.read_bytes()
        return False

    return {
        "fp32": lambda: logits(torch.float32), "bf16": lambda: logits(torch.bfloat16),
        "fp16": lambda: logits(torch.float16), "fuse": lambda: logits(torch.float32, fused=True), "eval": evaluated,
        "generate": written, "sample": sampled, "measure": measured, "verify": lambda: verify(packed),
        "rerun": lambda: rerun(packed, model).different, "resume": resumed,
    }  # fmt: skip


FIGURES = {"perplexity": "nll", "fidelity": "kl_mean"}


def attempted(runs: dict[str, Callable[[], Any]]) -> dict[str, tuple[str | None, Any]]:
    """Name -> what went wrong, None where nothing did; and what the run returned."""
    came: dict[str, tuple[str | None, Any]] = {}
    for name, run in runs.items():
        try:
            came[name] = None, run()
        except Exception as e:
            places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)]
            came[name] = f"{type(e).__name__} at {' '.join(places[-6:])}: {str(e)[:300]}", None
    return came


def mixed() -> None:
    """Raise unless the card refuses tensors of the host."""
    x = torch.ones(3, 4).to(card())
    with contextlib.suppress(RuntimeError):
        x + torch.ones(4)
        raise ValueError("the card takes tensors of the host")


def main(
    where: str, model: str, folder: Path, text: str, recipes: list[dict[str, Any]]
) -> dict[str, tuple[str | None, Any]]:
    """Compress with each recipe, `where` is "card" or "cpu", and use what the first has written; what came of each."""
    torch.backends.cuda.enable_flash_sdp(False)  # the host's attention, which the card does not have, sums otherwise
    if where == "cpu":
        runs = compressions(model, folder, recipes, torch.device("cpu"))
        return attempted(runs | uses(model, folder / recipes[0]["name"], text, torch.device("cpu")))
    teach_torch(folder)
    adapt()
    with Card(), Made():
        runs = {"mixing": mixed} | compressions(model, folder, recipes, card())
        return attempted(runs | uses(model, folder / recipes[0]["name"], text, card()))


if __name__ == "__main__":
    where, model, folder, text, recipes = sys.argv[1:]
    print(json.dumps(main(where, model, Path(folder), text, json.loads(Path(recipes).read_text()))))
