"""What holds in every test."""

import os
import signal

import pytest
import torch

from gptkernels import backend

# Read when the native library makes its first large result.
os.environ["GPTKERNELS_POISON"] = "1"
# cuBLAS gives the same bits every time with a workspace of its own; read when it is first used.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# Our own products, on a CPU with AMX too: only they promise the same bits for any number of threads (test_amx.py: torch's).
if backend.cpu_library()[0] is not None:
    backend.take_bf16_products("own")
# A shell ignores Ctrl-C in what it starts in the background, and so would the trainer under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, also those that the native kernels allocate: a result left unwritten shows itself."""
    # Not torch.use_deterministic_algorithms: that imports all of inductor, 5 seconds, to set a flag of it as well.
    torch._C._set_deterministic_algorithms(True)
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture
def any_order(poisoned_memory):
    """What poisoned_memory demands of torch, taken back."""
    torch._C._set_deterministic_algorithms(False)
    yield
    torch._C._set_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def threads():
    """A test may change the number of threads; the next one finds what it was."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def one_thread(threads):
    """Threads for such small models only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def device(request):
    """Where there is a GPU, a test of one of its backends makes its tensors there, if not marked on_cpu."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    wanted = parameters.get("backend") in ("triton", "cuda") and not request.node.get_closest_marker("on_cpu")
    if not torch.cuda.is_available() or not wanted:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
