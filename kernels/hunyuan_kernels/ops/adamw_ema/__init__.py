"""AdamW and the moving average of the weights in one pass."""
