"""Rows on a GPU, solved by Triton kernels: the whole iteration of a row on the device, without the host."""
