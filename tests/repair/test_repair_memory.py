"""How much memory a regression takes, beside the square of its inputs."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from taylorfx.repair.regression import Halves
torch.set_num_threads(1)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))

def repaired(batches, k, o=8):
    generator = torch.Generator().manual_seed(0)
    start, sums = torch.zeros(1, k, o, dtype=torch.double), Halves()
    for _ in range(batches):
        x = torch.randn(100, 1, k, generator=generator)
        sums = sums.take(x, torch.tanh(x[..., :o]), 50)
    return sums.whole.solve(start, sums.ridge(start, intercept=True))[0]

repaired(4, 200)  # what libraries load for good
batches, k = int(sys.argv[1]), 3000
before = status("VmRSS")
assert repaired(batches, k).isfinite().all()
print((status("VmHWM") - before) / (8 * k * k))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.parametrize(("batches", "squares"), [(5, 0.9), (31, 2.8)])
def test_a_regression_takes_its_rows_or_two_squares_of_its_inputs(batches, squares):
    paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM, str(batches)]
    done = subprocess.run(program, check=False, capture_output=True, text=True, env=paths)
    assert not done.returncode, done.stderr[-2000:]
    assert float(done.stdout) < squares, "and blocks of columns: up to half a square here"
