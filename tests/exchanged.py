"""What a process passes to other ranks, counted where torch.distributed hands tensors to a process group."""

from torch import ScriptObject
from torch.utils._python_dispatch import TorchDispatchMode


class Exchanged(TorchDispatchMode):
    """Inside ``with Exchanged() as found``, the messages and all-to-alls that this process begins.

    Attributes:
        messages: (receiver, bytes) of each message to a single rank.
        all_to_alls: for each all-to-all the bytes to each rank, this rank among them.
    """

    def __init__(self):
        super().__init__()
        self.messages, self.all_to_alls = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = [value for value in args if not isinstance(value, ScriptObject)]
            if func.__name__.startswith("send"):
                (tensor,), receiver = given[:2]
                self.messages.append((receiver, tensor.nbytes))
            elif func.__name__.startswith("alltoall_base"):
                _, tensor, _, splits = given[:4]
                a_row = tensor.nbytes // max(1, tensor.shape[0])
                self.all_to_alls.append([rows * a_row for rows in splits] if splits else tensor.nbytes)
            elif func.__name__.startswith("alltoall"):
                raise AssertionError(f"{func.__name__} is not counted")
        return func(*args, **(kwargs or {}))

    def to_others(self, rank, ranks):
        """The bytes of each all-to-all that leave this rank."""
        return [
            sum(sizes) - sizes[rank] if isinstance(sizes, list) else sizes * (ranks - 1) // ranks
            for sizes in self.all_to_alls
        ]
