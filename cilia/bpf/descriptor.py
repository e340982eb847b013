"""What maps, programs and links have in common: a file descriptor that is theirs to give back."""

from __future__ import annotations

import os


class Descriptor:
    """Owns `fd`, -1 when there is none. The kernel keeps the thing while anything else holds it."""

    __slots__ = ("fd",)

    fd: int

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back; what is pinned or attached stays. Idempotent."""
        fd = getattr(self, "fd", -1)  # absent when the constructor failed
        if fd >= 0:
            self.fd = -1
            os.close(fd)
