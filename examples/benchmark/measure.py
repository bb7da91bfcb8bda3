"""Measuring: bytes that operators allocate, peak of the memory in use, and time as a ratio in one run."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def storages(tree: Any) -> dict[int, int]:
            tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

        known = storages((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.total += sum(size for pointer, size in storages(out).items() if pointer not in known)
        return out


def allocated_bytes(function: Callable[[], object]) -> int:
    """Bytes that all operators of one call allocate together, whether or not they live at the same time."""
    with AllocatedBytes() as counted:
        function()
    return counted.total


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that one call has in use beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    result = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in result.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def multiplications(function: Callable[[], object]) -> int:
    """Multiplications in all matrix products of one call, those of attention included.

    A causal attention without a mask is half of the products of all pairs; the counter of torch does not know that,
    nor the attention of a CPU.
    """

    def attention(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
        return sdpa_flop_count(query, key, value) // (2 if causal else 1)

    def backward(
        grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, dropout: float, causal: bool, **_: Any
    ) -> int:
        return sdpa_backward_flop_count(grad, query, key, value) // (2 if causal else 1)

    own = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counted:
        function()
    return counted.get_total_flops() // 2


def kept_bytes(forward: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that a forward keeps for its backward, the model's own tensors left out: the activation memory."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(size for size, _ in kept.values())
    del output
    return total


def time_ratios(
    ways: dict[str, Callable[[], object]], repetitions: int, device: torch.device, base: str
) -> dict[str, dict[str, float]]:
    """Seconds of each way, and the median of its ratios to `base`; the ways take turns.

    On a CPU these are seconds of processor time, over all threads.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in ways}
    for function in ways.values():
        function()
    for _ in tqdm(range(repetitions), desc="repetitions", leave=False):
        for name, function in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = clock()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(clock() - start)
    return {
        name: {
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, times[base], strict=True)),
        }
        for name, own in times.items()
    }


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} threads"
    return {"device": name, "threads": threads, "torch": torch.__version__, "load": f"{os.getloadavg()[0]:.1f}"}
