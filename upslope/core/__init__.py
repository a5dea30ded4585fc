"""The formulas: pure functions of tensors. Time is the last axis; every other axis is batch."""
