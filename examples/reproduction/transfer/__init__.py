"""A study of settings that transfer: which residual and which rate hold at every width, depth, rank and length."""
