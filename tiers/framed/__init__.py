"""A tier around a tier: blocks leave memory in frames, checked on return and maybe compressed."""

from .format import HEADER_NBYTES, PAGE, frame_nbytes
from .tier import Framed, FrameStats

__all__ = ["HEADER_NBYTES", "PAGE", "FrameStats", "Framed", "frame_nbytes"]
