"""One command that measures on a GPU what was measured on a CPU alone: `bash launch/gpu_check.sh` (docs/gpu.md)."""
