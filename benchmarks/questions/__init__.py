"""Questions with a command each: half precision, the stability of the attention, neutral training."""
