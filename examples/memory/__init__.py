"""The parts of the memory experiment: its grid, the measurement of one cell, its processes, table and plot."""
