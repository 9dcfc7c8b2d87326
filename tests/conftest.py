"""Shared settings: one thread a test process, so that tests run beside each other and repeat to the bit."""

import torch

torch.set_num_threads(1)
