"""What lies between curvlab and the system: files, locks, signals, streams, memory, chance."""
