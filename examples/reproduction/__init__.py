"""The claims of the Fira paper (arXiv 2410.01623), measured again."""
