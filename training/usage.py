"""What a run has used: time, processor time, memory, energy and devices, summed over its resumes in usage.json."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .energy import Nvml, Rapl
from .stopwatch import memory

logger = logging.getLogger(__name__)

FILE = "usage.json"
VERSION = 1


class Usage:
    """Measures this process from its making on, and writes the record of the run.

    Each start of a run is a part of the record. A part is written with every checkpoint and at the end, so a killed
    one is known up to its last checkpoint.

    Args:
        path: the run's folder.
    """

    def __init__(self, path: Path):
        self.path = path / FILE
        self.started, self.cpu_before = time.monotonic(), cpu_seconds()
        self.rapl: Rapl | None = None
        self.nvml: Nvml | None = None
        self.training_from, self.first_step, self.training_s = self.started, 0, 0.0
        self.earlier: list[dict] | None = None
        self.readings: list[dict] = []

    def begin(self, accelerator: Accelerator, step: int):
        """Training begins, or goes on, after this many steps; every process calls it."""
        self.training_from, self.first_step = time.monotonic(), step
        # Processes of one machine share its packages, so one of them reads.
        self.rapl = Rapl() if accelerator.is_local_main_process else None
        self.nvml = Nvml(accelerator.device) if accelerator.device.type == "cuda" else None

    def read(self, accelerator: Accelerator) -> dict:
        """Return what this process has used so far."""
        device = accelerator.device
        energy = {}
        if self.rapl is not None:
            energy["cpu"] = {"joules": self.rapl.joules(), "missing": self.rapl.missing}
        if self.nvml is not None:
            energy["gpu"] = {"joules": self.nvml.joules(), "missing": self.nvml.missing}
        return {
            "cpu_s": cpu_seconds() - self.cpu_before,
            "peak_rss_bytes": memory()["peak_rss_bytes"],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "energy": energy,
        }

    def save(self, accelerator: Accelerator, step: int):
        """Write the record during training; every process calls it, the main one writes."""
        self.readings = gather_object([self.read(accelerator)])
        self.training_s = time.monotonic() - self.training_from
        if accelerator.is_main_process:
            self.write(step)

    def close(self, accelerator: Accelerator, step: int):
        """Write the record at the end of the run; the main process calls it, the others may be gone."""
        self.readings = [self.read(accelerator), *self.readings[1:]]
        self.write(step)

    def write(self, step: int):
        """Write usage.json, whole or not at all; a disk that is full is no reason to end a run here."""
        if self.earlier is None:
            self.earlier = read_parts(self.path)
        parts = [*self.earlier, self.part(step)]
        partial = self.path.with_suffix(".partial")
        content = {"version": VERSION, "total": total(parts), "parts": parts}
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as problem:
            logger.warning("%s could not be written: %s", self.path, problem)

    def part(self, step: int) -> dict:
        """Return what this start of the run has used, all processes together."""
        peaks = [reading["peak_rss_bytes"] for reading in self.readings]
        return {
            "from_step": self.first_step,
            "to_step": step,
            "wall_s": round(time.monotonic() - self.started, 3),
            "training_s": round(self.training_s, 3),
            "cpu_s": round(sum(reading["cpu_s"] for reading in self.readings), 3),
            "peak_rss_bytes": None if None in peaks else sum(peaks),
            "energy": {
                kind: summed([reading["energy"][kind] for reading in self.readings if kind in reading["energy"]])
                for kind in ("cpu", "gpu")
                if any(kind in reading["energy"] for reading in self.readings)
            },
            "processes": len(self.readings),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "processor": processor_name(),
            "devices": [reading["device"] for reading in self.readings],
        }


def total(parts: list[dict]) -> dict:
    """Sum the parts of a run; the memory is the largest part's, and energy is known where every part knows it.

    Steps that were lost by a kill and done again are in the time, and once in `steps`.
    """
    steps = sum(part["to_step"] - part["from_step"] for part in parts)
    training = sum(part["training_s"] for part in parts)
    peaks = [part["peak_rss_bytes"] for part in parts]
    kinds = [kind for kind in ("cpu", "gpu") if any(kind in part["energy"] for part in parts)]
    unknown = {"joules": None, "missing": "a part of the run did not measure it"}
    return {
        "parts": len(parts),
        "steps": parts[-1]["to_step"],
        "wall_s": round(sum(part["wall_s"] for part in parts), 3),
        "cpu_s": round(sum(part["cpu_s"] for part in parts), 3),
        "steps_per_s": round(steps / training, 4) if training else None,
        "peak_rss_bytes": None if None in peaks else max(peaks),
        "energy": {kind: summed([part["energy"].get(kind, unknown) for part in parts]) for kind in kinds},
    }


def summed(readings: list[dict]) -> dict:
    """Add up readings of one counter: {"joules", "missing"}; joules None, with the reason, where one has none."""
    missing = next((reading["missing"] for reading in readings if reading["joules"] is None), "")
    joules = None if missing else round(sum(reading["joules"] for reading in readings), 3)
    return {"joules": joules, "missing": missing}


def read_parts(path: Path) -> list[dict]:
    """Read the parts that earlier starts of the run have written; [] where there is no whole record."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return []


def cpu_seconds() -> float:
    """Return the processor seconds of this process, its threads and its ended children (the loader's workers)."""
    return sum(os.times()[:4])


def processor_name() -> str:
    """Return what the system calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
