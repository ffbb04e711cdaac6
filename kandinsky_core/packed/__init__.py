"""Weights held in fewer bits than they are computed in: block formats, scaled 8-bit floats, layers that use them."""
