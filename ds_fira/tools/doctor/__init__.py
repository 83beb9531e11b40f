"""What a training with a DeepSpeed config would do, or be refused for, before it starts.

from ds_fira.tools.doctor import examine

found = examine("ds_config.json", "llama_1b", gpus=8)
found.refusals, found.state_bytes, found.groups
"""

from ds_fira.tools.doctor.examine import Diagnosis, examine

__all__ = ["Diagnosis", "examine"]
