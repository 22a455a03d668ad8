"""Backend `triton`: exact attention and its statistics in triton kernels, for CUDA and ROCm.

Only this folder imports triton, so the package works where triton is missing. `backend.py` is its front.
"""
