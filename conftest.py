"""What has to be set before torch and triton are imported, for every test and doctest."""

import os

# Threads that wait by spinning take the cores from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then.
    os.environ.setdefault("TRITON_INTERPRET", "1")
