"""Code shared by the operators: windows, registration, runtimes, launch tables, kernel tiles."""
