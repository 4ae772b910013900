"""The learned policy: evicts the block whose slot is least likely to earn a hit soon."""

from .policy import Gittins

__all__ = ["Gittins"]
