"""Triton kernels, one folder each: reference.py (torch, the truth), triton.py, bench.py; the folder itself picks by device."""
