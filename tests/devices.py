"""Devices as parameters of a test: the CPU everywhere, and what needs a GPU only where there is one."""

import pytest
import torch


def devices(*names):
    """Parameters for those of `names` ("cpu", "cuda", "cuda:1") that are there, a GPU's marked gpu."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = [name for name in names if name == "cpu" or (torch.device(name).index or 0) < count]
    return [pytest.param(name, id=name, marks=() if name == "cpu" else pytest.mark.gpu) for name in there]
