"""Private names of torch that tests use. Seen with torch 2.13.0; a release may move them."""

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it adds the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeStore", "FakeTensorMode", "TorchDispatchMode"]
