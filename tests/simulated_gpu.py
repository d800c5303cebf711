"""A GPU that is none: tensors say that they are on `cuda:0` and lie in the host's memory.

Inside `SimulatedGpu` what is made on `cuda`, moved there, or computed from such tensors counts as
being there. As on a GPU, tensors of both places cannot be computed with together, and a copy to the
host that is not waited for holds no values yet. `waits` lists what makes the host wait for all that
the GPU was asked for: reading a number back, and copies that are not made from page-locked memory.

What it does not see: autograd's backward pass, other threads, and what torch's own C++ functions do
inside. `python -m tests.simulated_gpu train_iterative.py ...` runs a command of one process on it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode

from cirloop.distributed import worker

T = torch.Tensor
DEVICE = torch.device("cuda", 0)
READING: set[Any] = {
    T.item, T.tolist, T.cpu, T.__bool__, T.__int__, T.__float__, T.__index__,
    T.nonzero, torch.nonzero, T.equal, torch.equal, torch.masked_select, T.masked_select,
    torch.arange, torch.repeat_interleave, T.repeat_interleave,
}  # fmt: skip
"""What reads a GPU's tensors; the last ones find out how long their result is."""
MAKING: set[Any] = {torch.tensor, torch.as_tensor, torch.asarray}
MOVING: set[Any] = {T.to, T.cpu, T.cuda, torch.as_tensor, torch.asarray}
INDEXING: set[Any] = {T.__getitem__, T.__setitem__}
EITHER: set[Any] = {
    T.copy_, T.to, T.type_as, T.data.__set__, torch._has_compatible_shallow_copy_type
}  # fmt: skip
"""What takes tensors of both places."""
PLACE: dict[Any, Any] = {T.device.__get__: DEVICE, T.is_cuda.__get__: True}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)


def memory(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The memory of a tensor's values, also of a sparse one's."""
    strided = tensor.layout == torch.strided
    return (tensor if strided else tensor.values()).untyped_storage()


def names_gpu(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda"


def on_cpu(value: Any) -> Any:
    """An argument with the CPU in the place of the GPU."""
    return torch.device("cpu") if names_gpu(value) else value


class SimulatedGpu(TorchFunctionMode):
    """The places of tensors, by their memory, which is kept so that none gets another's."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.kept: dict[int, Any] = {}
        self._locked: set[int] = set()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> Self:
        super().__enter__()
        event = SimpleNamespace(synchronize=self._synchronize)
        self._stream = torch.cuda.current_stream
        stream = SimpleNamespace(record_event=lambda: event)
        torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.current_stream = self._stream
        super().__exit__(*error)

    def _synchronize(self) -> None:
        """What was copied without waiting arrives."""
        with torch._C.DisableTorchFunction(), torch.inference_mode():
            for copy, values in self._copies:
                copy.copy_(values)
        self._copies.clear()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        with torch._C.DisableTorchFunction():
            return memory(tensor).data_ptr() in self.kept

    def _put(self, value: Any) -> None:
        for tensor in tensors(value):
            storage = memory(tensor)
            if storage.data_ptr():
                self.kept[storage.data_ptr()] = storage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*tensors([args, kwargs])]
        here = [tensor for tensor in given if self.holds(tensor)]
        if func is torch._C._nn._parse_to:  # of Module.to
            return func(*args, **kwargs)
        if func is T.pin_memory:
            locked = args[0].clone()
            self._locked.add(memory(locked).data_ptr())
            self._copies.append((locked, locked))  # keeps it until a copy is waited for
            return locked
        if func is T.numpy and here:
            raise TypeError("numpy: the tensor is on the GPU")
        if func in PLACE:
            return PLACE[func] if here else func(*args, **kwargs)
        values = (*args, *kwargs.values())
        to_gpu = any(map(names_gpu, values))
        to_host = func is T.cpu or (func is T.to and any(str(value) == "cpu" for value in values))
        asynchronous = bool(kwargs.get("non_blocking"))
        self._check(func, args, given, here)
        waits = self._waits(func, args, given, here, to_gpu, to_host, asynchronous)
        self.waits += [getattr(func, "__name__", str(func))] * waits
        args = tuple(map(on_cpu, args))
        result = func(*args, **{name: on_cpu(value) for name, value in kwargs.items()})
        if func in MOVING and (to_host if here else to_gpu):
            result = result.clone()  # it has other memory there
        if to_host and here and asynchronous:
            copy = torch.full_like(result, torch.nan if result.is_floating_point() else 0)
            self._copies.append((copy, result))
            result = copy
        if to_gpu or (here and not to_host):
            self._put(result)
        return result

    def _waits(
        self, func: Any, args: Any, given: list[T], here: list[T],
        to_gpu: bool, to_host: bool, asynchronous: bool,
    ) -> bool:  # fmt: skip
        """Whether the host waits for the GPU."""
        if to_gpu and not here:
            locked = all(memory(tensor).data_ptr() in self._locked for tensor in given)
            copied = func in {*MAKING, T.to} and bool(len(torch.as_tensor(args[0]).view(-1)))
            return copied and not (given and locked and asynchronous)
        if not here:
            return False
        if func in INDEXING:
            places = [t for t in tensors(args[1]) if t.dim()]
            return any(t.dtype == torch.bool or not self.holds(t) for t in places)
        return func in READING or (to_host and not asynchronous)

    def _check(self, func: Any, args: Any, given: list[T], here: list[T]) -> None:
        """Raise RuntimeError where tensors of both places would be computed with."""
        if not here or func in EITHER:
            return
        if func in INDEXING:
            apart = not self.holds(args[0])
        else:
            apart = any(t.dim() and t.numel() and not self.holds(t) for t in given)
        if apart:
            raise RuntimeError(f"{func.__name__}: tensors on the GPU and on the CPU")


def simulate(put: Callable[[Any, str, Any], object] = setattr) -> None:
    """Let this process find a GPU; `put(object, name, value)` replaces attributes."""
    # what is asked before anything is computed is asked of torch's C++ parts, where there is none
    elsewhere = ("cirloop.distributed.launcher", "cirloop.report.environment_section")
    size = 80 << 30

    def is_available() -> bool:
        asks = sys._getframe(1).f_globals["__name__"]
        ours = asks.startswith("cirloop") or asks in {"__main__", "_gpu_round", "_model"}
        return ours and asks not in elsewhere

    def create_accelerator(hang_timeout_minutes: float = 30) -> Accelerator:
        accelerator = worker._create_on_cpu(timedelta(minutes=hang_timeout_minutes), fsdp=False)
        put(accelerator.state, "device", DEVICE)
        return accelerator

    replaced: dict[str, Any] = {
        "is_available": is_available,
        "synchronize": lambda: None,
        "mem_get_info": lambda: (size, size),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: None,
        "get_device_name": lambda: "simulated",
    }
    for name, value in replaced.items():
        put(torch.cuda, name, value)
    put(worker, "create_accelerator", create_accelerator)


def main() -> None:
    simulate()
    sys.argv = sys.argv[1:]
    with SimulatedGpu() as gpu:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print(f"on the simulated GPU: {len(gpu.kept)} tensors, {len(gpu.waits)} waits")


if __name__ == "__main__":
    main()
