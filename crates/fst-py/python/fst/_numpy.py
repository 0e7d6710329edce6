"""What NumPy has no counterpart for."""

import numpy


def unpack_f4(packed, dtype, shape):
    """Elements of four bits, of which a byte holds two, the first in its low half, as elements of a byte each."""
    unpacked = numpy.empty((packed.size, 2), numpy.uint8)
    numpy.bitwise_and(packed, 15, out=unpacked[:, 0])
    numpy.right_shift(packed, 4, out=unpacked[:, 1])
    return unpacked.reshape(-1).view(dtype).reshape(shape)
