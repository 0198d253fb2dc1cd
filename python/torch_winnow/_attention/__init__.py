"""What lies behind torch_winnow.attention: fake kernels and gradients."""
