"""Layouts: the order of the bytes of a block in an engine's tensors and in a slot."""

from .axes import LAYOUTS, Layout, LayoutError

__all__ = ["LAYOUTS", "Layout", "LayoutError"]
