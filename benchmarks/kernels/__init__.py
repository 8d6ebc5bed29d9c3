"""What compiled kernels are, what they read and write, and their launch parameters."""
