"""A tier around another tier: frames with a checksum, and optional compression of the blocks."""

from .format import HEADER_NBYTES, PAGE, frame_nbytes
from .tier import Framed, FrameStats

__all__ = ["HEADER_NBYTES", "PAGE", "FrameStats", "Framed", "frame_nbytes"]
