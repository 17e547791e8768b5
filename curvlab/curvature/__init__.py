"""State: one file per family, named as its paper names it."""
