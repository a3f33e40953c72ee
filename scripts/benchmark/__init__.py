"""Speed and memory, side by side, in fresh processes: `make bench`."""
