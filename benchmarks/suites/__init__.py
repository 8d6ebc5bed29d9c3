"""What is measured: the rows, who competes in them, their inputs and their costs."""
