"""FLOPs and peak memory of a run.

FLOPs are PyTorch's own count, exact on any machine. Memory is the peak of the process, or of the device's allocations
on a GPU.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_flops(run: Callable[[], object]) -> int:
    def count_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    # PyTorch's counter lacks the CPU's fused attention.
    custom_mapping: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention}
    with FlopCounterMode(display=False, custom_mapping=custom_mapping) as counter:
        run()
    return counter.get_total_flops()


def measure_peak_memory(run: Callable[[], object]) -> int:
    """Peak memory of a run in bytes, without that of building the models if the system can reset the peak."""
    status, clear_refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif clear_refs.exists():
        clear_refs.write_text("5")  # resets the peak
    run()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if status.is_file():  # on Linux, getrusage's peak starts from the parent process's
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
