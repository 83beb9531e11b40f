"""What the experiments share: runs and their results, tables and verdicts, the longer sections."""
