"""Triton kernels and their launchers: no autograd, no modules, nothing imported until an operator runs them."""
