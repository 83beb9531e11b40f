"""Independent references for the tests: plain, slow, obvious. Nothing in here imports ds_fira."""
