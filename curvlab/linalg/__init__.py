"""Pure functions and frozen values: tensors in, tensors out.

No state across steps, no model, no memory.
"""
