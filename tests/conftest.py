"""One thread per process: the tests run side by side, and small tensors on many threads mostly wait."""

import torch

torch.set_num_threads(1)
