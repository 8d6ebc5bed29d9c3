"""What operators share: windows, registration, runtimes, launch tables, tiles of kernels."""
