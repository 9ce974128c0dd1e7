"""What the GPU's clock and power do under a kernel's steady load: `python benchmarks/clocks.py OUT`.

At 16k in bf16, each candidate runs back to back for some seconds; clock and power are the means of nvidia-smi's
samples after the first. A kernel whose clock falls is bound by the card's power, and then only doing less work helps.
"""

import argparse
import subprocess
import time
from functools import partial
from pathlib import Path
from statistics import mean

import torch

import attngen
from attngen.check import timing
from attngen.check.inputs import random_inputs

SECONDS = 2.0
LENGTH = 16384


def sampled(run: timing.Run, seconds: float = SECONDS) -> dict[str, float]:
    """Milliseconds a call, MHz and watts of a steady load."""
    query = ("--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100")
    run()
    torch.cuda.synchronize()
    begin, calls = time.perf_counter(), 0
    with subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True) as watcher:
        while time.perf_counter() - begin < seconds:
            for _ in range(4):
                run()
            torch.cuda.synchronize()
            calls += 4
        elapsed = time.perf_counter() - begin
        watcher.terminate()
        assert watcher.stdout is not None
        lines = [line.split(",") for line in watcher.stdout.read().splitlines()]
    samples = [(float(mhz), float(watts)) for mhz, watts in lines[len(lines) // 2 :]]
    clock, power = (mean(column) for column in zip(*samples, strict=True))
    return {"ms": elapsed / calls * 1e3, "mhz": clock, "watts": power}


def main(out: Path) -> None:
    """One row per head dim, mask and candidate."""
    gemm = timing.cublas(torch.bfloat16)
    candidates: list[tuple[str, timing.Run, float]] = [("cublas", gemm, timing.GEMM_FLOPS)]
    for head_dim in (64, 128, 256):
        shape = timing.grid_shape(LENGTH, head_dim)
        q, k, v = random_inputs(shape, head_dim, head_dim, torch.bfloat16, "cuda", 0)
        for mask in ("full", "causal"):
            kernel = attngen.compile({"target": "sm_90a", "problem": {"head_dim": head_dim}, "mask": mask})
            runs = {"attngen": partial(kernel, q, k, v)} | timing.peers(q, k, v, mask == "causal", ("cudnn",))
            flops = timing.Point(shape, head_dim, head_dim, mask == "causal").flops
            candidates += [(f"{name} d{head_dim} {mask}", run, flops) for name, run in runs.items()]
    rows = []
    for name, run, flops in candidates:
        load = sampled(run)
        rows.append({"candidate": name, **load, "tflops": flops / load["ms"] / 1e9})
        print(
            f"{name:24} {rows[-1]['tflops']:6.0f} TFLOPS {load['mhz']:6.0f} MHz {load['watts']:5.0f} W",
            flush=True,
        )
    timing.write_json(out / "clocks.json", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    main(parser.parse_args().out)
