"""Pure functions and frozen values: tensors in, tensors out; no state across steps, no model, no
memory.
"""
