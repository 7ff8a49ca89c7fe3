"""What the benchmark makes of a profiler's events."""

import torch

from fusedopt.bench import looks


class Event:
    def __init__(self, name, start, length, device="CPU"):
        self.name, self.start_ns, self.duration_ns = (lambda value=value: value for value in (name, start, length))
        self.device_type = lambda: getattr(torch.autograd.DeviceType, device)


def test_what_the_profiler_saw():
    host = [
        Event("aten::add", 0, 10),
        Event("aten::mul", 12, 20),
        Event("aten::to", 14, 5),
        Event("Optimizer.step", 0, 99),
    ]
    assert looks.operators(host) == 2 and looks.operators([]) == 0
    device = [Event("step_kernel", 0, 5, "CUDA"), Event("Memcpy HtoD", 6, 1, "CUDA"), Event("cudaLaunchKernel", 0, 1)]
    annotation = Event("Optimizer.step#AdamW.step", 0, 99, "CUDA")  # of the host, on the device's line of time
    assert looks.kernels([*host, *device, annotation]) == [("step_kernel", 5e-9)]
