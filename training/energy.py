"""Energy counters of the machine: RAPL for processors and memory, NVML for GPUs. Read, never estimated."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
SAMPLE_S = 30.0  # A package's counter wraps after some 260 kJ: 20 minutes at 200 watts.


class Rapl:
    """Joules that this machine's processor packages and memory have used since this was made, whoever used them.

    Args:
        powercap: folder of the kernel's power zones.

    Attributes:
        missing: why there is no reading; "" where there is one.
    """

    def __init__(self, powercap: Path = POWERCAP):
        self.zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if counts(zone)]
        self.missing = "" if self.zones else f"this machine has no RAPL counters ({powercap})"
        self.used, self.last = 0, {}
        self.lock = threading.Lock()
        if self.zones:
            self.sample()
        if self.zones and not self.missing:
            threading.Thread(target=self._keep_up, daemon=True).start()

    def joules(self) -> float | None:
        """Return the joules so far; None where the counters cannot be read."""
        if not self.missing:
            self.sample()
        return None if self.missing else self.used / 1e6

    def sample(self):
        """Add what every zone has counted since the last sample, also where its counter has begun anew."""
        with self.lock:
            for zone in self.zones:
                try:
                    now = int((zone / "energy_uj").read_text())
                    span = int((zone / "max_energy_range_uj").read_text())
                except (OSError, ValueError) as problem:
                    self.missing = f"the counters cannot be read ({type(problem).__name__}: most kernels want root)"
                    return
                before = self.last.get(zone, now)
                self.used += now - before if now >= before else now + span - before
                self.last[zone] = now

    def _keep_up(self):
        pause = threading.Event()
        while not self.missing:
            pause.wait(SAMPLE_S)
            self.sample()


def counts(zone: Path) -> bool:
    """Tell whether a power zone is a package or its memory; cores and graphics are inside the package's count."""
    try:
        return (zone / "name").read_text().strip().startswith(("package", "dram"))
    except OSError:
        return False


class Nvml:
    """Joules that one GPU has used since this was made.

    Args:
        device: of this process.

    Attributes:
        missing: why there is no reading; "" where there is one.
    """

    def __init__(self, device: torch.device):
        self.missing = ""
        try:
            self.nvml = importlib.import_module("pynvml")
            self.nvml.nvmlInit()
            # By its UUID: CUDA's numbers are not NVML's where devices are hidden.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.handle = self.nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.begun = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        except ModuleNotFoundError:
            self.missing = "the GPU's counter needs the package nvidia-ml-py"
        except Exception as problem:  # NVML has an exception of its own for each thing that is not supported.
            self.missing = f"the GPU's counter cannot be read ({problem})"

    def joules(self) -> float | None:
        """Return the joules so far; None where the counter cannot be read."""
        if self.missing:
            return None
        try:
            return (self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.begun) / 1e3
        except Exception as problem:  # A device that fell off the bus must not end the run here.
            self.missing = f"the GPU's counter cannot be read ({problem})"
            return None
