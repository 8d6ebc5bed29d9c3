"""What is measured: groups of rows, their providers, inputs and costs."""
